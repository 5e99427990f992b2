"""Measured routes in JSON files: the one a user names, those that ship, and this device's own.

    {"format": 3, "arch": "sm_86", "measured_on": {"device": …, "driver": …, "torch": …, …},
     "expand": {shape key: {"date": …, "rows": M,
                            "routes": {name: {"microseconds": …, "tile": {…}}}}}}

The device's own file is in the user's cache folder and named after all of `measured_on`, so that
another driver or version measures anew and finds its old file again when it comes back. It is a
convenience: one that cannot be read or written is named once and ignored.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from lorasb_kernels.ops.triton.tiles import ExpandTile, architecture
from lorasb_kernels.utils.files import cache_folder, write_text

FORMAT = 3
ROUTES = ("two_call", "fused", "fused_descriptor", "dual")
SHIPPED = Path(__file__).resolve().parent.parent / "tuned"
LOGGER = logging.getLogger("lorasb_kernels")
_SAID: set[str] = set()


@dataclasses.dataclass(frozen=True)
class Timed:
    """The fastest tile of a route, and its time."""

    microseconds: float
    tile: ExpandTile


@dataclasses.dataclass(frozen=True)
class Measured:
    """A measured class of shapes: the day, the rows of the operands, and each route's time."""

    date: str
    rows: int
    routes: Mapping[str, Timed]

    def to_json(self) -> dict:
        """As in a file."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, entry: dict) -> "Measured":
        """Raises ValueError, KeyError, TypeError or AttributeError for anything else."""
        routes = {}
        for name, route in entry["routes"].items():
            if name not in ROUTES:
                raise ValueError(f"a route is {name!r}; expected one of {ROUTES}")
            routes[name] = Timed(float(route["microseconds"]), _tile(**route["tile"]))
        if "two_call" not in routes:
            raise ValueError(f"the routes are {list(routes)}; expected two_call among them")
        return cls(str(entry["date"]), int(entry["rows"]), routes)


def _tile(**sizes: int) -> ExpandTile:
    for name, value in sizes.items():
        whole = type(value) is int and value > 0
        if not whole or (name != "num_stages" and value & (value - 1)):
            raise ValueError(f"{name} of a tile is {value!r}; expected a power of two")
    return ExpandTile(**sizes)


@dataclasses.dataclass(frozen=True)
class RouteFile:
    """The content of a file."""

    arch: str
    measured_on: Mapping[str, str]
    expand: Mapping[str, Measured]

    def text(self) -> str:
        """As it is written."""
        content = {"format": FORMAT, "arch": self.arch, "measured_on": dict(self.measured_on)}
        content["expand"] = {key: entry.to_json() for key, entry in sorted(self.expand.items())}
        return json.dumps(content, indent=1) + "\n"


def read_routes(path: Path) -> RouteFile:
    """Reads a file of measured routes.

    Raises:
        OSError: it cannot be read.
        ValueError: naming the file and what is wrong with it.
    """
    text = path.read_bytes()
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(f"format is {content['format']}; expected {FORMAT}")
        expand = {key: Measured.from_json(entry) for key, entry in content["expand"].items()}
        return RouteFile(str(content["arch"]), dict(content["measured_on"]), expand)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a file of measured routes: {error!r}") from error


class DeviceFile:
    """What was measured on this device, kept for every later process.

    Args:
        path: the file; it may not exist yet.
        arch: architecture of the device.
        measured_on: device and versions, which the file has to name.
    """

    def __init__(self, path: Path, arch: str, measured_on: Mapping[str, str]):
        self.path, self.arch, self.measured_on = path, arch, dict(measured_on)

    def read(self) -> dict[str, Measured]:
        """The entries by shape key; none if there is no file, or none that can be used."""
        try:
            content = read_routes(self.path)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            say_once(f"measured routes are ignored: {error}")
            return {}
        if (content.arch, content.measured_on) != (self.arch, self.measured_on):
            described = ", ".join(f"{name} {value}" for name, value in content.measured_on.items())
            say_once(f"measured routes are ignored: {self.path} was measured on {described}")
            return {}
        return dict(content.expand)

    def add(self, found: Mapping[str, Measured], replace: bool = False) -> dict[str, Measured]:
        """Keeps entries; returns those that stand.

        That is the entry of whoever was first, so that processes that measure at the same time
        take the same routes; with `replace` the new one.
        """
        try:
            with self._locked():
                kept = self.read()
                merged = {**kept, **found} if replace else {**found, **kept}
                if merged != kept:
                    write_text(self.path, RouteFile(self.arch, self.measured_on, merged).text())
        except OSError as error:
            say_once(f"measured routes are used but not kept in {self.path}: {error.strerror}")
            return dict(found)
        return {key: merged[key] for key in found}

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time, where the file system has locks; a file is whole in any case."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_suffix(".lock"), "a") as lock:
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed
            yield


def device_file(device: torch.device) -> DeviceFile:
    """The file of a CUDA device in the user's cache folder."""
    return _device_file(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _device_file(index: int) -> DeviceFile:
    measured_on = {
        "device": torch.cuda.get_device_name(index),
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "lorasb_kernels": _version("lorasb_kernels"),
    }
    return DeviceFile(
        file_path(measured_on), architecture(torch.device("cuda", index)), measured_on
    )


def file_path(measured_on: Mapping[str, str]) -> Path:
    """Where the measurements on a device with these versions are kept."""
    name = re.sub(r"[^a-z0-9]+", "-", measured_on["device"].lower()).strip("-")
    digest = hashlib.sha256(json.dumps(measured_on, sort_keys=True).encode()).hexdigest()
    try:
        folder = cache_folder()
    except RuntimeError:  # a user without a home folder, as in a container
        folder = Path(tempfile.gettempdir()) / f"lorasb-{os.getuid()}"
    return folder / "routes" / f"{name}-{digest[:12]}.json"


def _driver() -> str:
    """Version of the kernel driver, or of its CUDA interface where that is not shown."""
    with contextlib.suppress(OSError):
        found = re.search(r"\s(\d+\.\d+[.\d]*)\s", Path("/proc/driver/nvidia/version").read_text())
        if found:
            return found.group(1)
    return f"CUDA {torch._C._cuda_getDriverVersion()}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # runs from its sources
        return "not installed"


def named_file() -> Path | None:
    """The file that `LORASB_TUNING` names."""
    named = os.environ.get("LORASB_TUNING")
    return Path(named) if named else None


@functools.cache
def read_named(path: Path) -> RouteFile:
    """`read_routes` of the file that a user named, once per process.

    Raises:
        FileNotFoundError, ValueError: naming the file and what is wrong with it.
    """
    if not path.exists():
        raise FileNotFoundError(f"LORASB_TUNING is {str(path)!r}; expected an existing file")
    return read_routes(path)


def say_once(text: str) -> None:
    """Logs a line that this process has not logged before."""
    if text not in _SAID:
        _SAID.add(text)
        LOGGER.warning("%s", text)


__all__ = [
    "FORMAT",
    "ROUTES",
    "SHIPPED",
    "DeviceFile",
    "Measured",
    "RouteFile",
    "Timed",
    "device_file",
    "file_path",
    "named_file",
    "read_named",
    "read_routes",
    "say_once",
]
