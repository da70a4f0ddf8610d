"""Environments: which distributions a function needs, at which versions, and an interpreter that has them."""
