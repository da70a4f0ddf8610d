"""Kubeflow components, compiler front, local engine and Kubeflow client."""
