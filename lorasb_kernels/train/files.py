"""Atomic JSON files; the rest is in `lorasb_kernels.files`."""

import json
from pathlib import Path
from typing import Any

from lorasb_kernels.files import write_text


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")
