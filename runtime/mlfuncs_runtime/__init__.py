"""What runs a function: worker, router, autoscaler, supervisor, and the targets they serve."""
