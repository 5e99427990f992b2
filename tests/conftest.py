"""Without a GPU, Triton kernels run in Triton's interpreter.

This must be set before a kernel is decorated, hence at the import of this file.
"""

import os

import torch

# No test reads or writes the measurements in the cache of whoever runs it.
os.environ.setdefault("LORASB_TUNE", "off")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
