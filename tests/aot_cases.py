"""What the library launches: each launcher on the shapes of ViT-B/16, L/16, H/14 and the narrow
ViT-Ti/16, in each dtype; what is wrong with the machine code of a kernel."""

from collections.abc import Callable, Mapping

import aot
import torch

from maefast.kernels import add_layer_norm, bias_gelu, gather_patches, layer_norm, masked_mse, random_masking, unshuffle

F32, BF16, F16, U8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8
N, C = 256, 3
GEOMETRIES = {"patch16": (16, 14), "patch14": (14, 16)}  # patch, grid
ENCODERS = ((192, 50), (768, 50), (1024, 50), (1280, 65))  # D, T
DECODERS = ((512, 197), (512, 257))
TYPES = {  # of the residual stream, mask token and positions, or of images; of what a layer reads
    "fp32": (F32, F32),
    "bf16": (BF16, BF16),
    "fp16": (F16, F16),
    "bf16_fp32": (F32, BF16),
    "fp16_fp32": (F32, F16),
    "bf16_uint8": (U8, BF16),
}


# Kernel -> loads and stores of fewer than 8 bytes that it may have, and what they access.
NARROW = {
    "attention_bwd_long_kernel": (4, 0, "the log-sum-exp of a row"),
    "attention_bwd_row_kernel": (2, 0, "the log-sum-exp of a row"),
    "attention_fwd_kernel": (0, 4, "the log-sum-exp of a row"),
    "column_sum_kernel": (9, 1, "sums over chunks"),
    "gather_patches_kernel": (15, 1, "ids, a mask, pixels at the edge of a patch"),
    "masked_mse_bwd_kernel": (109, 100, "pixels of apart channels, rows of pred that no unit of eight values divides"),
    "masked_mse_fwd_kernel": (78, 1, "pixels of apart channels, rows of pred that no unit of eight values divides; sums"),
    "masked_mse_sum_kernel": (10, 1, "sums of blocks, the loss"),
    "random_masking_kernel": (5, 6, "noise, a mask"),
    "_add_layer_norm_fwd_kernel": (0, 2, "mean and rstd"),
    "_bias_gelu_bwd_kernel": (3, 1, "a bias of odd width, sums of a chunk"),
    "_column_sum_kernel": (0, 3, "sums over chunks"),
    "_gather_patches_fwd_kernel": (18, 0, "uint8 pixels, ids"),
    "_layer_norm_bwd_kernel": (12, 0, "mean and rstd"),
    "_layer_norm_fwd_kernel": (0, 2, "mean and rstd"),
    "_masked_mse_bwd_kernel": (47, 64, "pixels whose channels lie apart in the image"),
    "_masked_mse_fwd_kernel": (45, 2, "pixels whose channels lie apart in the image, sums of a program"),
    "_masked_mse_sum_kernel": (0, 1, "the loss"),
    "_random_masking_fwd_kernel": (2, 1, "noise, a mask"),
}


def problems(kernel: str, shape: str, stack: int, loads: Mapping[int, int], stores: Mapping[int, int]) -> list[str]:
    """shape: the case, or the constants of a template; 1 or 2 is the kernel for unaligned data."""
    found = [f"{kernel} of {shape} keeps {stack} bytes a thread in local memory"] if stack else []
    if shape in ("1", "2"):
        return found
    for kind, accesses, most in zip(("loads", "stores"), (loads, stores), NARROW.get(kernel, (0, 0)), strict=False):
        narrow = sum(count for width, count in accesses.items() if width < 8)
        if narrow > most:
            found.append(f"{kernel} of {shape} has {narrow} {kind} of fewer than 8 bytes")
    return found


def launches_random_masking(L):
    with aot.recorded(random_masking) as launches:
        random_masking.random_masking_fwd(torch.empty(N, L), L // 4)
    return launches


def launches_gather_patches(patch, grid, imgs_dtype, dtype):
    L = grid * grid
    imgs, ids = torch.empty(N, C, patch * grid, patch * grid, dtype=imgs_dtype), torch.empty(N, L // 4, dtype=torch.int64)
    statistics = (torch.empty(C), torch.empty(C)) if imgs_dtype == U8 else (None, None)
    with aot.recorded(gather_patches) as launches:
        gather_patches.gather_patches_fwd(imgs, ids, patch, patch, *statistics, dtype)
    return launches


def launches_unshuffle(D, T, token_dtype, x_dtype):
    L = T - 1
    x, ids = torch.empty(N, 1 + L // 4, D, dtype=x_dtype), torch.empty(N, L, dtype=torch.int64)
    token, positions = torch.empty(1, 1, D, dtype=token_dtype), torch.empty(1, 1 + L, D, dtype=token_dtype)
    with aot.recorded(unshuffle) as launches:
        y = unshuffle.unshuffle_fwd(x, ids, token, positions)
        unshuffle.unshuffle_bwd(y, ids, L // 4, x_dtype)
    return launches


def launches_masked_mse(patch, grid, imgs_dtype, dtype, compact=False):
    L = grid * grid
    imgs = torch.empty(N, C, patch * grid, patch * grid, dtype=imgs_dtype)
    pred = torch.empty(N, L - L // 4 if compact else L, patch * patch * C, dtype=dtype)
    args = (pred, imgs, torch.empty(N, L), patch, patch, True)
    statistics = (torch.empty(C), torch.empty(C)) if imgs_dtype == U8 else (None, None)
    with aot.recorded(masked_mse) as launches:
        masked_mse.masked_mse_fwd(*args, *statistics)
        masked_mse.masked_mse_bwd(torch.empty(()), *args, *statistics)
    return launches


def launches_norms(D, T, residual_dtype, dtype):
    """As in a block: a branch in `dtype` beside its residual. Backward gives dx in both, its
    column sum, and then the output, too."""
    rows, weight, bias = (N * T, D), torch.empty(D), torch.empty(D)
    x, residual = torch.empty(rows, dtype=dtype), torch.empty(rows, dtype=residual_dtype)
    with aot.recorded(layer_norm) as launches:
        _, mean, rstd = layer_norm.layer_norm_fwd(residual, weight, bias, 1e-6, dtype)
        cast = None if dtype == residual_dtype else dtype
        for y_dtype in (None, dtype):
            layer_norm.layer_norm_bwd(x, residual, residual, weight, bias, mean, rstd, y_dtype, cast, True)
    with aot.recorded(add_layer_norm) as more:
        add_layer_norm.add_layer_norm_fwd(x, residual, weight, bias, 1e-6, dtype)
    return launches + more


def launches_bias_gelu(D, T, dtype):
    """With a bias of fp32 and the output again; and of values that hold the bias already."""
    x, bias = torch.empty(N * T, 4 * D, dtype=dtype), torch.empty(4 * D)
    with aot.recorded(bias_gelu) as launches:
        for shift, with_y in ((bias, True), (None, False)):
            bias_gelu.bias_gelu_fwd(x, shift)
            bias_gelu.bias_gelu_bwd(x, x, shift, with_y, True)
    return launches


def _cases() -> dict[str, Callable[[], list[aot.Launch]]]:
    cases = {}

    def add(name, launches, *args):
        cases[name] = lambda: launches(*args)

    for name, (patch, grid) in GEOMETRIES.items():
        add(f"random_masking-{name}", launches_random_masking, grid * grid)
        for dtypes, (imgs, out) in TYPES.items():
            add(f"gather_patches-{name}-{dtypes}", launches_gather_patches, patch, grid, imgs, out)
            add(f"masked_mse-{name}-{dtypes}", launches_masked_mse, patch, grid, imgs, out)
            add(f"masked_mse-{name}-{dtypes}-compact", launches_masked_mse, patch, grid, imgs, out, True)
    for dtypes, (residual, branch) in TYPES.items():
        if residual == U8:
            continue
        for D, T in DECODERS:
            add(f"unshuffle-{D}x{T}-{dtypes}", launches_unshuffle, D, T, residual, branch)
        for D, T in (*ENCODERS, *DECODERS):
            add(f"norms-{D}x{T}-{dtypes}", launches_norms, D, T, residual, branch)
            if residual == branch:
                add(f"bias_gelu-{D}x{T}-{dtypes}", launches_bias_gelu, D, T, branch)
    return cases


CASES = _cases()
