"""A process that decides routes on a device that does not exist, with a stub timer.

    python -m tests.ops.triton.calibrating WINNER [ROWS …]

The operands and the routes are real; WINNER is the route that the timer prefers in this process.
Prints the chosen routes in a line, then how often it measured.
"""

import sys

from lorasb_kernels.ops.triton.expand import RUN
from lorasb_kernels.ops.triton.route_decision import decide
from tests.ops.triton.routes import StubTimer, device_file, operands

if __name__ == "__main__":
    timer, chosen = StubTimer(sys.argv[1]), []
    for rows in map(int, sys.argv[2:]):
        chosen.append(decide(operands(rows), RUN, device_file(), timer).name)
    print(*chosen)
    print(timer.calls)
