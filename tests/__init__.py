"""The tests. They import `ptxcheck`, which executes compiled kernels on the CPU, from `tools/`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
