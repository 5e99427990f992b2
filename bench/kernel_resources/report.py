"""What the Triton kernels take of a GPU, without one: registers, shared memory, occupancy.

Compiles every kernel with every shipped tile ahead of time and reads the result: the cubin's
resource usage by `cuobjdump`, which comes with Triton, and the PTX for tensor-core instructions
and the width of the asynchronous copies.

    python -m bench.kernel_resources.report --dtype bfloat16 float32 --write FILE
    python -m bench.kernel_resources.report --arch sm_86 --kernel expand --json

Triton's interpreter must be off: it replaces the kernels as they are imported.
"""

import argparse
import collections
import dataclasses
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.kernel_resources.expand_cases import EXPAND_KERNELS
from bench.kernel_resources.experts_cases import EXPERTS_KERNELS
from bench.kernel_resources.sass import disassemble
from bench.kernel_resources.sign_cases import SIGN_KERNELS
from lorasb_kernels.ops.triton.core_backward import gradient_kernel
from lorasb_kernels.ops.triton.factor_gradient import factor_gradient_kernel
from lorasb_kernels.ops.triton.factor_tiles import factor_tile
from lorasb_kernels.ops.triton.projection import projection_kernel
from lorasb_kernels.ops.triton.projection_tiles import projection_tile
from lorasb_kernels.ops.triton.tiles import ARCHITECTURES, Tile, gradient_tile, rank_tiles
from lorasb_kernels.utils.files import write_text

DTYPES = ("bfloat16", "float16", "float32")
GROUPED_RANKS = (16, 96, 512)
RANKS = (16, 24, 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
_TENSOR_CORES = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma": "mma.sync"}
_ELEMENTS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclasses.dataclass(frozen=True)
class Device:
    """Limits of one architecture (CUDA programming guide, compute capabilities)."""

    shared_per_block: int
    shared_per_sm: int
    warps_per_sm: int
    blocks_per_sm: int
    registers_per_sm: int = 65536


DEVICES = {
    "sm_80": Device(163 * 1024, 164 * 1024, 64, 32),
    "sm_86": Device(99 * 1024, 100 * 1024, 48, 16),
    "sm_89": Device(99 * 1024, 100 * 1024, 48, 24),
    "sm_90": Device(227 * 1024, 228 * 1024, 64, 32),
    "sm_100": Device(227 * 1024, 228 * 1024, 64, 32),
    "sm_120": Device(99 * 1024, 100 * 1024, 48, 24),
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel as it would be launched: its arguments and options.

    A pointer is named by its type (`"*"` for one to `dtype`), a tensor descriptor by its block
    [rows, columns] as a tuple.
    """

    kernel: str
    case: str
    arch: str
    dtype: str
    tile: Tile
    arguments: dict[str, object]
    constants: dict[str, object]


@dataclasses.dataclass(frozen=True)
class Report:
    """What a variant compiled to; `shared` in bytes, `occupancy` in warps over the maximum.

    `products_of_16_bits` counts a warp's `mma.sync` instructions for 16-bit operands, m16n8k16.
    `wgmma_products` and `wgmma_waits` are counted in the SASS: where ptxas cannot let them overlap
    it waits behind each.
    """

    kernel: str
    case: str
    arch: str
    dtype: str
    tile: str
    registers: int
    stack: int
    shared: int
    blocks_per_sm: int
    occupancy: float
    tensor_core: str
    copies_of_16_bytes: int
    narrower_copies: int
    products_of_16_bits: int
    tensor_map_copies: int
    wgmma_products: int
    wgmma_waits: int


def variants(arch: str, dtype: str, kernel: str) -> Iterator[Variant]:
    """The variants of a kernel that the shipped tiles make, on shapes divisible by 16."""
    function, build = KERNELS[kernel]
    for case, tile, arguments, constants in build(arch, getattr(torch, dtype)):
        if "PRECISION" in function.arg_names:
            constants.setdefault("PRECISION", "tf32x3" if dtype == "float32" else "tf32")
        yield Variant(kernel, case, arch, dtype, tile, arguments, constants)


# dy B of a layer with 4104 outputs: rows of 8 elements more than a multiple of 16, A transposed.
_ODD_OPERANDS = {
    "n": 4104 // 8,
    "stride_xm": 4104 // 8,
    "stride_ar": 1,
    "stride_an": 24 // 8,
}


def _projections(arch: str, dtype: torch.dtype):
    for r in RANKS:
        width, tiles = rank_tiles(r)
        # M, split, dropout, layers. Few rows are split over the columns; many take taller tiles,
        # where there are some.
        cases = [(8191, 0, 0, 1), (511, 1, 0, 1), (511, 1, 1, 1)]
        if projection_tile(arch, dtype, r, 8191, False) != projection_tile(
            arch, dtype, r, 511, False
        ):
            cases += [(8191, 1, 0, 1), (8191, 1, 1, 1)]
        if r in GROUPED_RANKS:
            cases += [(8191, 0, 0, 3), (511, 1, 0, 3)]
        for M, split, dropout, layers in cases:
            tile = projection_tile(arch, dtype, r, M, bool(dropout))
            arguments = {
                **dict.fromkeys(("x_ptr", "a_ptr", "h_ptr", "p_ptr"), "*"),
                "r_ptr": "*fp32",
                **dict.fromkeys(("a_second_ptr", "a_third_ptr"), "*" if layers > 1 else None),
                **dict.fromkeys(("r_second_ptr", "r_third_ptr"), "*fp32" if layers > 1 else None),
                "partial_ptr": "*fp32" if split else None,
                "arrived_ptr": "*i32" if split else None,
                "seed_ptr": "*i64" if dropout else None,
                "M": M,
                "n": 4096 // 8,
                "r": r // 8,
                "stride_xm": 4096 // 8,
                "stride_xn": 1,
                "stride_ar": 4096 // 8,
                "stride_an": 1,
                "stride_rj": r,
                "stride_ri": 1,
                "splits": 7 if split else 1,
                "steps_per_split": 16,
                "scaling": 0.5,
                "keep_scale": 1.5,
                "threshold": 2**31 + 1,
            }
            constants = {
                **dict.fromkeys(("N_UNIT", "R_UNIT", "XM_UNIT"), 8),
                "AR_UNIT": 1 if r == 24 else 8,
                "AN_UNIT": 8 if r == 24 else 1,
                "DROPOUT": bool(dropout),
                "SPLIT": bool(split),
                "LAYERS": layers,
                "RANK_TILES": tiles,
                "BLOCK_R": width,
            }
            arguments |= _ODD_OPERANDS if r == 24 else {}
            tall = ", tall" if split and M == 8191 else ""
            case = f"r={r}" + (", split" if split else "") + (", dropout" if dropout else "")
            case += f", {layers} layers" if layers > 1 else ""
            yield case + tall, tile, arguments, constants


def _gradients(arch: str, dtype: torch.dtype):
    tile = gradient_tile(arch, dtype)
    for r in (16, 96, 128):
        width, _ = rank_tiles(r)
        arguments = {
            **dict.fromkeys(("g_ptr", "h_ptr"), "*"),
            **dict.fromkeys(("dR_ptr", "partial_ptr"), "*fp32"),
            "arrived_ptr": "*i32",
            "M": 8191,
            "r": r,
            "splits": 7,
            "rows_per_split": 1024,
            "scaling": 0.5,
        }
        yield f"width={width}", tile, arguments, {"SPLIT": True, "BLOCK_R": width}


def _factor_gradients(arch: str, dtype: torch.dtype):
    for r in RANKS:
        width, tiles = rank_tiles(r)
        for split, dropout in ((False, False), (True, False), (True, True)):
            arguments = {
                "left_ptr": "*",
                "rows_ptr": "*",
                "out_ptr": "*fp32",
                "partial_ptr": "*fp32" if split else None,
                "arrived_ptr": "*i32" if split else None,
                "seed_ptr": "*i64" if dropout else None,
                "M": 8191,
                "k": 4096,
                "r": r,
                "stride_left": r,
                "stride_rows": 4096,
                "splits": 7,
                "rows_per_split": 1024,
                "keep_scale": 1.5,
                "threshold": 2**31 + 1,
            }
            constants = {
                "SPLIT": split,
                "DROPOUT": dropout,
                "RANK_TILES": tiles,
                "BLOCK_R": width,
            }
            case = f"r={r}" + (", split" if split else "") + (", dropout" if dropout else "")
            yield case, factor_tile(arch, dtype, r, dropout), arguments, constants


# Each kernel and what makes its cases for an architecture and a dtype.
KERNELS = {
    "projection": (projection_kernel, _projections),
    "gradient": (gradient_kernel, _gradients),
    **EXPAND_KERNELS,
    "factor_gradient": (factor_gradient_kernel, _factor_gradients),
    **SIGN_KERNELS,
    **EXPERTS_KERNELS,
}


def compile_variant(variant: Variant):
    """Triton's compiled kernel for a variant."""
    function, _ = KERNELS[variant.kernel]
    element = _ELEMENTS[variant.dtype]
    arguments = dict(variant.arguments)
    for name, value in arguments.items():
        if value == "*":
            arguments[name] = f"*{element}"
        elif isinstance(value, tuple):
            arguments[name] = f"tensordesc<{element}[{value[0]},{value[1]}]>"
    constants = {**variant.constants, **variant.tile.launch_options()}
    return compile_kernel(function, arguments, constants, variant.arch)


def compile_kernel(function, arguments: dict[str, object], constants: dict[str, object], arch: str):
    """Compiles a `triton.jit` function ahead of time as a launch with `arguments` would.

    Args:
        function: the jitted function.
        arguments: runtime arguments by name: numbers, None, `"*bf16"` and the like for a
            pointer divisible by 16, or `"tensordesc<bf16[128,64]>"` for a descriptor. None and
            1 become constants, as Triton's launcher does.
        constants: constexpr arguments, `num_warps` and `num_stages`.
        arch: `"sm_86"` and so on.
    """
    if not isinstance(function, triton.JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set; unset it to compile kernels")
    constants = dict(constants)
    launch = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    signature, divisible = {}, {}
    for index, name in enumerate(function.arg_names):
        value = constants.get(name, arguments.get(name))
        specialized = not function.params[index].do_not_specialize
        if name in constants or value is None or (value == 1 and specialized):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, str):
            signature[name] = value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
        pointer = isinstance(value, str) and value.startswith("*")
        if pointer or (isinstance(value, int) and specialized and value % 16 == 0):
            divisible[(index,)] = [["tt.divisibility", 16]]
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    source = ASTSource(function, signature, constants, divisible)
    return triton.compile(source, target=target, options=launch)


def report(variant: Variant) -> Report:
    """Compiles a variant and reads what it takes."""
    compiled = compile_variant(variant)
    registers, stack = registers_and_stack(compiled.asm["cubin"])
    ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
    sass = disassemble(compiled.asm["cubin"])
    blocks = blocks_per_sm(variant.arch, registers, shared, variant.tile.num_warps)
    widths = collections.Counter(
        int(size, 0)
        for size in re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], (\w+)", ptx)
    )
    return Report(
        kernel=variant.kernel,
        case=variant.case,
        arch=variant.arch,
        dtype=variant.dtype,
        tile=str(variant.tile),
        registers=registers,
        stack=stack,
        shared=shared,
        blocks_per_sm=blocks,
        occupancy=blocks * variant.tile.num_warps / DEVICES[variant.arch].warps_per_sm,
        tensor_core=next((name for name, code in _TENSOR_CORES.items() if code in ptx), ""),
        copies_of_16_bytes=widths.pop(16, 0),
        narrower_copies=sum(widths.values()),
        products_of_16_bits=ptx.count("mma.sync.aligned.m16n8k16"),
        tensor_map_copies=ptx.count("cp.async.bulk.tensor.2d.shared"),
        wgmma_products=sass.count("HGMMA."),
        wgmma_waits=sass.count("WARPGROUP.DEPBAR"),
    )


def registers_and_stack(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", listing).groups()
    return int(registers), int(stack)


def blocks_per_sm(arch: str, registers: int, shared: int, num_warps: int) -> int:
    """Blocks per multiprocessor: registers in units of 256 per warp, 1 KB reserved per block."""
    device = DEVICES[arch]
    registers_per_warp = -(-registers * 32 // 256) * 256
    return min(
        device.registers_per_sm // registers_per_warp // num_warps,
        device.shared_per_sm // (shared + 1024),
        device.warps_per_sm // num_warps,
        device.blocks_per_sm,
    )


def markdown(reports: list[Report]) -> str:
    """The table of `docs/kernel_resources.md`."""
    lines = [
        "# Registers, shared memory and occupancy of the Triton kernels",
        "",
        f"Compiled ahead of time by Triton {triton.__version__}, not measured; written by",
        "`python -m bench.kernel_resources.report --dtype bfloat16 float32 --write FILE`. float16",
        "has bfloat16's tiles and sizes.",
        "Stack is what a thread spills, in bytes. Blocks and occupancy are for a multiprocessor;",
        "occupancy is the share of its warp slots. Dynamic shapes and strides divisible by 16.",
    ]
    for arch in dict.fromkeys(r.arch for r in reports):
        limit = DEVICES[arch].shared_per_block // 1024
        lines += ["", f"## {arch} (shared memory ≤ {limit} KB per block)", ""]
        lines += [
            "| kernel | case | dtype | tile | registers | stack | shared KB | blocks | occupancy "
            "| tensor cores |",
            "|---|---|---|---|--:|--:|--:|--:|--:|---|",
        ]
        lines += [
            f"| {r.kernel} | {r.case} | {r.dtype} | {r.tile} | {r.registers} | {r.stack} "
            f"| {r.shared / 1024:.0f} | {r.blocks_per_sm} | {r.occupancy:.0%} | {r.tensor_core} |"
            for r in reports
            if r.arch == arch
        ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--dtype", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--kernel", nargs="+", default=KERNELS, choices=KERNELS)
    parser.add_argument("--case", help="only cases that match this regular expression")
    parser.add_argument("--json", action="store_true", help="print the reports as JSON")
    parser.add_argument("--write", metavar="FILE", help="write the table here, not to the screen")
    options = parser.parse_args(arguments)
    reports = [
        report(variant)
        for arch in options.arch
        for dtype in options.dtype
        for kernel in options.kernel
        for variant in variants(arch, dtype, kernel)
        if options.case is None or re.fullmatch(options.case, variant.case)
    ]
    if options.json:
        print(json.dumps([dataclasses.asdict(r) for r in reports]))
    elif options.write:
        write_text(options.write, markdown(reports))
    else:
        print(markdown(reports), end="")


if __name__ == "__main__":
    main()
