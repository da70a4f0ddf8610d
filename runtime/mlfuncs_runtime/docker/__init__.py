"""Endpoints and runs as containers of this machine's Docker Engine."""
