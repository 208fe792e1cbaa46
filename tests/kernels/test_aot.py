"""Machine code of representative kernels, compiled here: no spills, accesses as wide as the data.

scripts/aot_table.py compiles all of CASES."""

import csv
import re
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

import aot  # noqa: E402
from aot_cases import CASES, problems  # noqa: E402
from triton import language as tl  # noqa: E402

from maefast import kernels  # noqa: E402

KERNELS = Path(__file__).resolve().parents[2] / "docs" / "kernels.csv"

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
        assert not problems(usage.kernel, case, usage.stack, usage.loads, usage.stores)
        assert not usage.has_tf32, f"{usage.kernel} rounds fp32 to TF32"
        assert usage.registers <= 168, f"{usage.kernel} takes {usage.registers} registers: too few warps fit beside each other"


@pytest.mark.parametrize(
    ("case", "kernels"),
    [
        ("gather_patches-patch16-fp32", {"_gather_patches_fwd_kernel"}),
        ("unshuffle-512x197-fp32", {"_unshuffle_fwd_kernel", "_unshuffle_bwd_kernel"}),
        ("norms-1024x50-bf16_fp32", {"_layer_norm_fwd_kernel", "_layer_norm_bwd_kernel", "_add_layer_norm_fwd_kernel"}),
        ("bias_gelu-768x50-bf16", {"_bias_gelu_fwd_kernel", "_bias_gelu_bwd_kernel"}),
    ],
)
def test_rows_are_read_and_written_by_16_bytes(case, kernels, tmp_path):
    """But for the statistics and sums that NARROW names."""
    usages = [usage for usage in (aot.compiled(launch, 90, tmp_path) for launch in CASES[case]()) if usage.kernel in kernels]
    assert {usage.kernel for usage in usages} == kernels
    for usage in usages:
        assert usage.loads[16] > 0
        assert set(usage.stores) <= {4, 16}
        assert usage.stores[16] > 0


def test_narrow_stores_are_seen(tmp_path):
    x = torch.empty(64)
    usage = aot.compiled(aot.Launch(_copy_kernel, (x[1:33], x[:32]), {"num_warps": 1}), 90, tmp_path)
    assert usage.stores == {4: 1}
    assert problems(usage.kernel, "32", usage.stack, usage.loads, usage.stores) == [
        "_copy_kernel of 32 has 1 loads of fewer than 8 bytes",
        "_copy_kernel of 32 has 1 stores of fewer than 8 bytes",
    ]


@triton.jit
def _copy_kernel(x_ptr, y_ptr):
    at = tl.arange(0, 32)
    tl.store(y_ptr + at, tl.load(x_ptr + at))


def test_every_kernel_is_compiled_and_in_the_table():
    sources = "".join(path.read_text() for path in Path(kernels.__file__).parent.glob("*.py"))
    names = set(re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE))
    assert names == {launch.kernel.fn.__name__ for launches in CASES.values() for launch in launches()}
    with KERNELS.open() as file:
        assert names <= {row["kernel"] for row in csv.DictReader(file)}


@triton.jit
def _product_kernel(x_ptr, y_ptr, PRECISION: tl.constexpr):
    at = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(y_ptr + at, tl.dot(tl.load(x_ptr + at), tl.load(x_ptr + at), input_precision=PRECISION))


@pytest.mark.parametrize(("precision", "found"), [("tf32", True), ("ieee", False)])
def test_tf32_would_be_seen(precision, found, tmp_path):
    x = torch.empty(32, 32)
    assert aot.compiled(aot.Launch(_product_kernel, (x, x, precision), {}), 90, tmp_path).has_tf32 is found
