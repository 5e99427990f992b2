"""The demonstrations: a real model and real data that install from the package index."""
