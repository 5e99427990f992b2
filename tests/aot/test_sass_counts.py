"""The shipped counts are those of today's kernels; and what one instruction counts."""

import json

import pytest

from bench.kernel_resources.sass import count, demands
from lorasb_kernels.hardware.counts import PATH
from tests.aot.process import run_compiling

SHIPPED = json.loads(PATH.read_text())


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("sm_86", "expand | dx | 128×128×64, 8 warps, 3 stages"),
        ("sm_90", "projection | r=96 | 128×64, 8 warps, 4 stages"),
    ],
)
def test_counting_again_gives_the_shipped_counts(arch, name):
    triton = pytest.importorskip("triton")
    if triton.__version__ != SHIPPED["triton"]:
        pytest.skip(f"counted with Triton {SHIPPED['triton']}; this is {triton.__version__}")
    kernel = name.split(" | ")[0]
    arguments = ("--json", "--arch", arch, "--kernel", kernel, "--name", name.replace("|", "."))
    found = json.loads(run_compiling("bench.kernel_resources.counts", *arguments))
    assert found == {arch: {name: SHIPPED["counts"][arch][name]}}, (
        "the kernel has changed: run `python -m bench.kernel_resources.counts`"
    )


@pytest.mark.parametrize(
    ("text", "flops", "moved"),
    [
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", 8 * 2 * 16 * 8 * 16, 0),
        ("HMMA.1688.F32.TF32 R4, R8, R12, R4", 8 * 2 * 2 * 16 * 8 * 8, 0),
        (
            "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR24], R24, gsb0",
            2 * 2 * 64 * 256 * 16,
            2 * 2 * 16 * (64 + 256),
        ),
        (
            "HGMMA.64x32x8.F32.TF32 R24, R40, gdesc[UR8], R24",
            2 * 2 * 2 * 64 * 32 * 8,
            2 * 4 * 8 * 32,
        ),
        ("LDSM.16.M88.4 R4, [R2]", 0, 8 * 512),
        ("LDSM.16.MT88.2 R4, [R2]", 0, 8 * 256),
        ("LDS R4, [R2]", 0, 8 * 128),
        ("STS.128 [R2], R4", 0, 8 * 512),
        ("STS.U16 [R2], R4", 0, 8 * 64),
        ("LDGSTS.E.BYPASS.128 [R2], [R4.64]", 0, 8 * 512),
        ("LDG.E.128 R4, [R2.64]", 0, 0),
        ("LDSLOT R4", 0, 0),
    ],
)
def test_what_an_instruction_of_eight_warps_counts(text, flops, moved):
    assert demands(text, 8) == (flops, 8, moved)


def test_instructions_count_to_the_innermost_loop():
    lines = {
        0x00: "MOV R1, R2",
        0x10: "IADD3 R1, R1, 0x1, RZ",  # outer loop
        0x20: "STS [R1], R2",  # inner loop
        0x30: "@!P1 BRA 0x20",
        0x40: "@P0 BRA 0x10",
        0x50: "@!P2 BRA 0x80",  # forward
        0x60: "@P3 EXIT",
        0x70: "EXIT",
        0x80: "BRA 0x20",  # behind the exit: a wait that returns
        0x90: "NOP",
    }
    sass = "\n".join(f"        /*{at:04x}*/   {text} ;   /* 0x0 */" for at, text in lines.items())
    assert count(sass, 4) == ([0, 20, 0], [[0, 8, 0], [0, 8, 512]])


def test_what_a_merged_loop_skips_between_tiles_runs_once():
    lines = {
        0x00: "MOV R1, R2",
        0x10: "@P0 BRA 0x30",  # but for the first step of a tile
        0x20: "IADD3 R1, R1, 0x1, RZ",
        0x30: "HMMA.16816.F32.BF16 R4, R8, R12, R4",
        0x40: "@P1 BRA 0x70",  # but for the last step of a tile
        0x50: "STG.E.128 [R2.64], R4",
        0x60: "STS.128 [R2], R4",
        0x70: "@P2 BRA 0x10",
        0x80: "EXIT",
    }
    sass = "\n".join(f"        /*{at:04x}*/   {text} ;   /* 0x0 */" for at, text in lines.items())
    assert count(sass, 4) == ([0, 20, 2048], [[4 * 4096, 16, 0]])
