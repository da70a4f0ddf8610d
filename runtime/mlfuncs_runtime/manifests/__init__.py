"""What is deployed to a cluster, as plain dicts: pure functions from a workload to manifests."""
