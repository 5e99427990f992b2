"""Writes what every kernel and tile asks of a multiprocessor, for the performance model.

    python -m bench.kernel_resources.counts                  # all; about ten minutes
    python -m bench.kernel_resources.counts --arch sm_86 --kernel expand
    python -m bench.kernel_resources.counts --json --name "expand . forward .*"   # prints them

Compiles ahead of time, in bf16 (fp16 has the same tiles and instructions), without dropout, and
counts the SASS (`sass.py`). What is compiled replaces its entries of the file, others stay. The
model reads the file where there is no compiler.
"""

import argparse
import dataclasses
import json
import re
from collections.abc import Iterator

import torch
import triton

from bench.kernel_resources.report import (
    DEVICES,
    KERNELS,
    Variant,
    blocks_per_sm,
    compile_variant,
    registers_and_stack,
    variants,
)
from bench.kernel_resources.sass import count, disassemble
from lorasb_kernels.hardware.counts import PATH, key
from lorasb_kernels.hardware.gpus import OF_ARCHITECTURE
from lorasb_kernels.ops.triton.tiles import ARCHITECTURES, EXPAND_CANDIDATES
from lorasb_kernels.utils.files import write_text

DTYPE = "bfloat16"


def counted_variants(arch: str, kernel: str) -> Iterator[Variant]:
    """Those of `report.variants` without dropout, and the frozen product in every tile."""
    for variant in variants(arch, DTYPE, kernel):
        if "dropout" in variant.case or "odd" in variant.case:
            continue
        if variant.arguments.get("stride_an") == 24 // 8:
            continue
        yield variant
        if kernel == "expand":
            for tile in EXPAND_CANDIDATES[getattr(torch, DTYPE).itemsize]:
                if tile != variant.tile:
                    yield dataclasses.replace(variant, tile=tile)


def counted(variant: Variant) -> dict | None:
    """The entry of a variant; None for a tile that does not fit on the device or spills."""
    compiled = compile_variant(variant)
    registers, stack = registers_and_stack(compiled.asm["cubin"])
    shared, warps = compiled.metadata.shared, variant.tile.num_warps
    if stack or shared > DEVICES[variant.arch].shared_per_block:
        return None
    once, loops = count(disassemble(compiled.asm["cubin"]), warps)
    entry = {
        "blocks": blocks_per_sm(variant.arch, registers, shared, warps),
        "once": once,
        "loops": loops,
    }
    return entry | {"wgmma": True} if "wgmma.mma_async" in compiled.asm["ptx"] else entry


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", nargs="+", default=list(OF_ARCHITECTURE), choices=ARCHITECTURES)
    parser.add_argument("--kernel", nargs="+", default=list(KERNELS), choices=KERNELS)
    parser.add_argument("--name", default=".*", help="only entries whose names match this")
    parser.add_argument("--json", action="store_true", help="print the entries, write nothing")
    options = parser.parse_args(arguments)
    counts = {
        arch: {
            name: entry
            for kernel in options.kernel
            for variant in counted_variants(arch, kernel)
            if re.fullmatch(options.name, name := key(kernel, variant.case, variant.tile))
            and (entry := counted(variant)) is not None
        }
        for arch in options.arch
    }
    if options.json:
        print(json.dumps(counts))
        return
    content = json.loads(PATH.read_text()) if PATH.exists() else {"counts": {}}
    content["triton"] = triton.__version__
    for arch, entries in counts.items():
        kept = {
            name: entry
            for name, entry in content["counts"].get(arch, {}).items()
            if name.split(" | ")[0] not in options.kernel or not re.fullmatch(options.name, name)
        }
        content["counts"][arch] = kept | entries
    write_text(PATH, _text(content))


def _text(content: dict) -> str:
    """JSON with one line per kernel, so that a changed kernel is a changed line."""
    parts = []
    for arch, entries in sorted(content["counts"].items()):
        lines = (
            f"   {json.dumps(k, ensure_ascii=False)}: {json.dumps(entries[k])}"
            for k in sorted(entries)
        )
        parts.append(f'  "{arch}": {{\n' + ",\n".join(lines) + "\n  }")
    return (
        f'{{\n "triton": "{content["triton"]}",\n "counts": {{\n' + ",\n".join(parts) + "\n }\n}\n"
    )


if __name__ == "__main__":
    main()
