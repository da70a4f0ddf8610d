"""Endpoints and runs on a Kubernetes cluster."""
