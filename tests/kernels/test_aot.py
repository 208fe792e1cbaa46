"""The machine code, compiled here: no spills on the architectures of data centres, memory accesses as wide as the data allow.

A few representative kernels; scripts/aot_table.py compiles all of CASES."""

import re
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

import aot  # noqa: E402
from aot_cases import CASES  # noqa: E402
from triton import language as tl  # noqa: E402

from maefast import kernels  # noqa: E402

KERNELS_MD = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"

REPRESENTATIVE = {
    "random_masking-patch16": (90,),
    "gather_patches-patch16-fp32": (90,),
    "unshuffle-512x197-bf16_fp32": (90,),
    "masked_mse-patch14-bf16_uint8": (80, 90, 100),
    "masked_mse-patch16-bf16_fp32-compact": (90,),
    "norms-1024x50-bf16_fp32": (80, 90, 100),
    "norms-1024x50-fp32": (90,),
    "bias_gelu-768x50-bf16": (80, 90, 100),
    "bias_gelu-768x50-fp32": (90,),
}


@pytest.mark.parametrize(
    ("case", "capability"), [(case, capability) for case, capabilities in REPRESENTATIVE.items() for capability in capabilities]
)
def test_no_spills(case, capability, tmp_path):
    for launch in CASES[case]():
        usage = aot.compiled(launch, capability, tmp_path)
        assert usage.stack == 0, f"{usage.kernel} keeps {usage.stack} bytes a thread in local memory"
        assert not usage.has_tf32, f"{usage.kernel} rounds fp32 to TF32"
        assert usage.registers <= 168, f"{usage.kernel} takes {usage.registers} registers: too few warps fit beside each other"


@pytest.mark.parametrize(
    ("case", "launch"),
    [("gather_patches-patch16-fp32", 0), ("unshuffle-512x197-fp32", 0), ("norms-1024x50-fp32", 1), ("bias_gelu-768x50-fp32", 1)],
)
def test_accesses_are_16_bytes_wide(case, launch, tmp_path):
    usage = aot.compiled(CASES[case]()[launch], 90, tmp_path)
    assert re.search(r"ld\.global\.v4\.b32", usage.ptx)
    assert re.search(r"st\.global\.v4\.b32", usage.ptx)
    assert not re.search(r"st\.global\.b32", usage.ptx), "a store is narrow"


def test_every_kernel_is_compiled_and_in_the_table():
    sources = "".join(path.read_text() for path in Path(kernels.__file__).parent.glob("*.py"))
    names = set(re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE))
    assert names == {launch.kernel.fn.__name__ for launches in CASES.values() for launch in launches()}
    assert names <= set(re.findall(r"`(\w+)` \|", KERNELS_MD.read_text()))


@triton.jit
def _product_kernel(x, y, PRECISION: tl.constexpr):
    at = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(y + at, tl.dot(tl.load(x + at), tl.load(x + at), input_precision=PRECISION))


@pytest.mark.parametrize(("precision", "found"), [("tf32", True), ("ieee", False)])
def test_tf32_would_be_seen(precision, found, tmp_path):
    x = torch.empty(32, 32)
    assert aot.compiled(aot.Launch(_product_kernel, (x, x, precision), {}), 90, tmp_path).has_tf32 is found
