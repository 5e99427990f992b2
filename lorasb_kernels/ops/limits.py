"""What all backends and callers agree on. Imports nothing: settings are read without torch."""

BACKENDS = ("reference", "triton", "cuda")
BACKEND_CHOICES = ("auto", *BACKENDS)
MAX_RANK = 512

__all__ = ["BACKENDS", "BACKEND_CHOICES", "MAX_RANK"]
