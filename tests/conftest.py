"""Without a GPU, Triton kernels run in Triton's interpreter.

The choice must be made before a kernel is decorated, hence at import of this file.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
