"""Functions to Nuclio and from it."""
