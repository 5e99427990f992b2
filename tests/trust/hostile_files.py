"""Tiny adapters and base models on disk, and what hypothesis makes of their files."""

import json
import math
import struct
from pathlib import Path

import torch
from hypothesis import strategies as st
from torch import nn

from lorasb_kernels import LoRASBConfig, adapt, save_adapter

FEATURES, RANK = 6, 2
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "C64")
DTYPES += ("U16", "U64", "F4", "F6_E2M3", "F8_E8M0", "X")
BYTES = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "U16": 2}
NAMES = ("../../escaped", "/etc/passwd", "a\0b", "", "__import__('os')", "x.lora_A", "__metadata__")
NUMBERS = (float("nan"), float("inf"), 1e30, -0.0, 1e-40)


class Layers(nn.Sequential):
    """Two linear layers of six features."""

    def __init__(self, seed: int = 0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES))


def write_adapter(folder: Path, init: str) -> None:
    """What `save_adapter` writes for a trained adapter of `Layers`."""
    config = LoRASBConfig(r=RANK, init=init, target_modules=("0", "1"), core_std=0.1)
    model = adapt(Layers(), config, progress=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    save_adapter(model, folder)


def read_raw(path: Path) -> tuple[dict, bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_raw(path: Path, header: dict, data: bytes, length: int | None = None) -> None:
    """A safetensors file with any header, and any stated length of it."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


METADATA = ("format", "subspace", "digest", "columns", "transposed")
decimals = st.sampled_from(["0", "1", "33", "-1", "7.5", str(2**31), str(10**30)])
numbers = st.integers(0, 8) | st.sampled_from([2**31, 2**62, 2**63 - 1, -1, 10**30])
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers(-(10**400), 10**400)
    | st.text(max_size=6)
    | st.sampled_from(["lora-sb", "lora-xs", "lora", "0", "(", "(a+)+$", "../x", "1", "LORA"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


def damage_tensors(draw, path: Path) -> None:
    """Renames, drops, adds, reshapes, retypes or overwrites tensors, or breaks the header."""
    header, data = read_raw(path)
    metadata = header.pop("__metadata__", {})
    name = draw(st.sampled_from(sorted(header)))
    kind = draw(st.integers(0, 9))
    length = None
    if kind == 0:
        header[draw(st.sampled_from(NAMES) | st.text(max_size=9))] = header.pop(name)
    elif kind == 1:
        del header[name]
    elif kind == 2:
        header[draw(st.sampled_from(NAMES) | st.text(max_size=9))] = header[name]
    elif kind == 3:
        header[name]["shape"] = draw(st.lists(numbers, max_size=3))
    elif kind == 4:
        retype(header, name, draw(st.sampled_from(DTYPES)))
    elif kind == 5:
        target = draw(st.sampled_from([name, name, "x.lora_A", f"{name}.lora_B"]))
        header[target] = append_tensor(draw, header[name]["shape"], len(data))
        data += bytes([draw(st.integers(0, 255))]) * (header[target]["data_offsets"][1] - len(data))
    elif kind == 6:
        value = draw(st.sampled_from(NUMBERS))
        start, end = header[name]["data_offsets"]
        size = BYTES.get(header[name]["dtype"], 1)
        filler = struct.pack("<d", value) if size == 8 else struct.pack("<f", value)[-size:]
        data = data[:start] + filler * ((end - start) // size) + data[end:]
    elif kind == 7:
        header[name]["data_offsets"] = draw(st.lists(numbers, max_size=3))
    elif kind == 8:
        metadata |= draw(st.dictionaries(st.sampled_from(METADATA), json_values | decimals))
    else:
        length = draw(numbers.filter(lambda n: 0 <= n < 2**64))
    write_raw(path, {"__metadata__": metadata, **header} if metadata else header, data, length)


def retype(header: dict, name: str, dtype: str) -> None:
    """Another dtype over the same bytes, in a shape that fits them."""
    start, end = header[name]["data_offsets"]
    header[name]["dtype"] = dtype
    header[name]["shape"] = [(end - start) // BYTES.get(dtype, 1)]


def append_tensor(draw, own_shape: list[int], start: int) -> dict:
    """The entry of a tensor behind the data, of a drawn dtype and shape."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.sampled_from([own_shape, own_shape, [], [1], [0, 5], [FEATURES, RANK]]))
    if not 0 <= math.prod(shape) <= 1000:  # left by an earlier damage; the bytes are really written
        shape = [1]
    end = start + math.prod(shape) * BYTES.get(dtype, 1)
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def damage_json(draw, path: Path) -> None:
    """Replaces, drops or adds a value at the top or one level below, or the whole."""
    record = json.loads(path.read_text())
    if draw(st.integers(0, 9)) == 0:
        record = draw(json_values)
    else:
        inner = [value for value in record.values() if isinstance(value, dict) and value]
        target = draw(st.sampled_from([record, *inner]))
        key = draw(st.sampled_from(sorted(target)) | st.text(max_size=5))
        if draw(st.booleans()):
            target.pop(key, None)
        else:
            target[key] = draw(json_values)
    path.write_text(json.dumps(record))


def damage_bytes(draw, path: Path) -> None:
    """Flips, inserts or cuts off bytes, empties or removes the file."""
    content = bytearray(path.read_bytes())
    kind = draw(st.integers(0, 3))
    position = draw(st.integers(0, max(0, len(content) - 1)))
    if kind == 0 and content:
        content[position] ^= 1 << draw(st.integers(0, 7))
    elif kind == 1:
        content[position:position] = draw(st.binary(min_size=1, max_size=9))
    elif kind == 2:
        del content[position:]
    else:
        path.unlink()
        return
    path.write_bytes(bytes(content))


def damage(draw, folder: Path) -> None:
    """One to three damages to the files of `folder`."""
    for _ in range(draw(st.integers(1, 3))):
        files = sorted(path for path in folder.iterdir() if path.stat().st_size)
        if not files:
            return
        path = draw(st.sampled_from(files))
        structured = damage_json if path.suffix == ".json" else damage_tensors
        try:
            draw(st.sampled_from([structured, structured, damage_bytes]))(draw, path)
        except (ValueError, KeyError, TypeError, AttributeError, struct.error, UnicodeDecodeError):
            damage_bytes(draw, path)  # what an earlier damage left cannot be parsed
