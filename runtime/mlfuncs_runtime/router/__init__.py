"""The router: one address for every endpoint, in front of its workers."""
