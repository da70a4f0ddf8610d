"""Bundles: a function packed with its code, spec and locked requirements, named by what it means."""
