"""Initializing the adapters: update estimation, truncated SVD, the named methods."""
