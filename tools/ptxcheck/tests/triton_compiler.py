"""torch and Triton for the tests that compile with them; importing this skips without them."""

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
TensorDescriptor = pytest.importorskip("triton.tools.tensor_descriptor").TensorDescriptor
if triton.knobs.runtime.interpret:
    pytest.skip(
        "Triton interprets kernels here (TRITON_INTERPRET) and compiles none",
        allow_module_level=True,
    )
