"""The machine code, compiled here: no spills on the architectures of data centres, memory accesses as wide as the data allow."""

import re

import pytest
import torch

triton = pytest.importorskip("triton")

import aot  # noqa: E402

from maefast.kernels import (  # noqa: E402
    add_layer_norm,
    bias_gelu,
    gather_patches,
    layer_norm,
    masked_mse,
    random_masking,
    unshuffle,
)

F32, BF16, F16, U8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8
N, C, D = 256, 3, 512
GEOMETRIES = {"patch16": (16, 14), "patch14": (14, 16)}  # patch, grid
TYPES = {"fp32": (F32, F32), "bf16": (BF16, BF16), "fp16": (F16, F16), "bf16_fp32": (F32, BF16), "bf16_uint8": (U8, BF16)}


def launches_random_masking(L=196, K=49):
    with aot.recorded(random_masking) as launches:
        random_masking.random_masking_fwd(torch.empty(N, L), K)
    return launches


def launches_gather_patches(patch, grid, imgs_dtype, dtype):
    imgs, ids = torch.empty(N, C, patch * grid, patch * grid, dtype=imgs_dtype), torch.empty(N, 49, dtype=torch.int64)
    statistics = (torch.empty(C), torch.empty(C)) if imgs_dtype == U8 else (None, None)
    with aot.recorded(gather_patches) as launches:
        gather_patches.gather_patches_fwd(imgs, ids, patch, patch, *statistics, dtype)
    return launches


def launches_unshuffle(D, x_dtype, token_dtype, L=196, K=49):
    x, ids = torch.empty(N, 1 + K, D, dtype=x_dtype), torch.empty(N, L, dtype=torch.int64)
    token, positions = torch.empty(1, 1, D, dtype=token_dtype), torch.empty(1, 1 + L, D, dtype=token_dtype)
    with aot.recorded(unshuffle) as launches:
        y = unshuffle.unshuffle_fwd(x, ids, token, positions)
        unshuffle.unshuffle_bwd(y, ids, K, x_dtype)
    return launches


def launches_masked_mse(patch, grid, imgs_dtype, dtype, compact=False, norm_pix=True):
    L = grid * grid
    imgs = torch.empty(N, C, patch * grid, patch * grid, dtype=imgs_dtype)
    pred = torch.empty(N, L - L // 4 if compact else L, patch * patch * C, dtype=dtype)
    args = (pred, imgs, torch.empty(N, L), patch, patch, norm_pix)
    statistics = (torch.empty(C), torch.empty(C)) if imgs_dtype == U8 else (None, None)
    with aot.recorded(masked_mse) as launches:
        masked_mse.masked_mse_fwd(*args, *statistics)
        masked_mse.masked_mse_bwd(torch.empty(()), *args, *statistics)
    return launches


def launches_norms(D, residual_dtype, dtype):
    """As in a block: a branch in `dtype` beside its residual; backward gives dx in both, and the output again."""
    rows, weight, bias = (N * 50, D), torch.empty(D), torch.empty(D)
    x, residual = torch.empty(rows, dtype=dtype), torch.empty(rows, dtype=residual_dtype)
    with aot.recorded(layer_norm) as launches:
        _, mean, rstd = layer_norm.layer_norm_fwd(residual, weight, bias, 1e-6, dtype)
        cast = None if dtype == residual_dtype else dtype
        layer_norm.layer_norm_bwd(x, residual, residual, weight, bias, mean, rstd, dtype, cast)
    with aot.recorded(add_layer_norm) as more:
        add_layer_norm.add_layer_norm_fwd(x, residual, weight, bias, 1e-6, dtype)
    return launches + more


def launches_bias_gelu(D, dtype):
    x, bias = torch.empty(N * 50, D, dtype=dtype), torch.empty(D)
    with aot.recorded(bias_gelu) as launches:
        bias_gelu.bias_gelu_fwd(x, bias)
        bias_gelu.bias_gelu_bwd(x, x, bias, True)
    return launches


CASES = {"random_masking": launches_random_masking}
for _name, (_patch, _grid) in GEOMETRIES.items():
    for _dtypes, (_imgs, _out) in TYPES.items():
        CASES[f"gather_patches-{_name}-{_dtypes}"] = lambda a=(_patch, _grid, _imgs, _out): launches_gather_patches(*a)
        CASES[f"masked_mse-{_name}-{_dtypes}"] = lambda a=(_patch, _grid, _imgs, _out): launches_masked_mse(*a)
    CASES[f"masked_mse-{_name}-compact"] = lambda a=(_patch, _grid, F32, BF16, True): launches_masked_mse(*a)
for _dtypes, (_token, _x) in TYPES.items():
    if _token != U8:
        CASES[f"unshuffle-512-{_dtypes}"] = lambda a=(512, _x, _token): launches_unshuffle(*a)
CASES["unshuffle-1280-bf16"] = lambda: launches_unshuffle(1280, BF16, BF16)
for _dtypes, (_residual, _branch) in TYPES.items():
    if _residual != U8:
        for _D in (192, 512, 768, 1024, 1280):
            CASES[f"norms-{_D}-{_dtypes}"] = lambda a=(_D, _residual, _branch): launches_norms(*a)
for _dtype in (F32, BF16, F16):
    CASES[f"bias_gelu-{str(_dtype)[6:]}"] = lambda a=(3072, _dtype): launches_bias_gelu(*a)

REPRESENTATIVE = {
    "random_masking": (90,),
    "gather_patches-patch16-fp32": (90,),
    "unshuffle-512-bf16_fp32": (90,),
    "masked_mse-patch14-bf16_uint8": (80, 90, 100),
    "masked_mse-patch16-compact": (90,),
    "norms-1024-bf16_fp32": (80, 90, 100),
    "bias_gelu-bfloat16": (80, 90, 100),
}


@pytest.mark.parametrize(
    ("case", "capability"), [(case, capability) for case, capabilities in REPRESENTATIVE.items() for capability in capabilities]
)
def test_no_spills(case, capability, tmp_path):
    for launch in CASES[case]():
        usage = aot.compiled(launch, capability, tmp_path)
        assert usage.stack == 0, f"{usage.kernel} keeps {usage.stack} bytes a thread in local memory"
        assert usage.registers <= 168, f"{usage.kernel} takes {usage.registers} registers: too few warps fit beside each other"


@pytest.mark.parametrize(
    ("case", "launch"),
    [("gather_patches-patch16-fp32", 0), ("unshuffle-512-fp32", 0), ("norms-1024-fp32", 1), ("bias_gelu-float32", 1)],
)
def test_accesses_are_16_bytes_wide(case, launch, tmp_path):
    usage = aot.compiled(CASES[case]()[launch], 90, tmp_path)
    assert re.search(r"ld\.global\.v4\.b32", usage.ptx)
    assert re.search(r"st\.global\.v4\.b32", usage.ptx)
    assert not re.search(r"st\.global\.b32", usage.ptx), "a store is narrow"
