"""Endpoints as the user sees them: deploying, calling, traffic, and the port to what serves them."""
