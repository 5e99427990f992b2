"""The backends, dtypes and poisoned memory of the operator tests, here too."""

from tests.ops.conftest import backend, device, dtype, poisoned_memory

__all__ = ["backend", "device", "dtype", "poisoned_memory"]
