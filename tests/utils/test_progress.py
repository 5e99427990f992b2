"""One progress bar for everything: on a terminal only, and never in the way of what it shows."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

CODE = """
import sys
from lorasb_kernels.utils.progress import progress_bar, track
if "no-tqdm" in sys.argv:
    sys.modules["tqdm"] = sys.modules["tqdm.auto"] = None
assert list(track("walking")([1, 2, 3])) == [1, 2, 3]
bar = progress_bar(2, "working", "pass", enabled="disabled" not in sys.argv)
bar.set_postfix_str("loss 1.5")
bar.update(2)
bar.close()
"""


def shown(*flags: str, terminal: bool = True) -> str:
    """What is written to standard error, which is a terminal or a pipe."""
    reader, writer = pty.openpty() if terminal else os.pipe()
    if terminal:
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    subprocess.run([sys.executable, "-c", CODE, *flags], stderr=writer, check=True)
    os.close(writer)
    text = b""
    try:
        while block := os.read(reader, 1 << 16):
            text += block
    except OSError:  # the end of a terminal
        pass
    os.close(reader)
    return text.decode()


def test_bars_are_shown_on_a_terminal():
    text = shown()
    for part in ("walking", "3/3", "working", "2/2", "loss 1.5", "pass"):
        assert part in text


def test_nothing_is_shown_where_nobody_looks_or_asked():
    assert shown(terminal=False) == ""
    assert shown("no-tqdm") == ""
    assert "working" not in shown("disabled")
