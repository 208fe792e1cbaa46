"""Inputs of each op in the dtypes of its tests, and the op as a function with one result."""

from collections.abc import Iterator
from typing import Any

import torch
from support import Op, permutations, removed_mask, widened
from torch import Tensor

from maefast import ops
from maefast.ops import BlockWeights

F32, BF16, F16, F64, U8 = torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8
EPS = 1e-6
HEADS, BLOCK_WIDTH, HIDDEN = 3, 24, 40  # of the blocks

Inputs = dict[str, Tensor]
Dtypes = tuple[torch.dtype | None, ...]
Size = dict[str, Any]
NativeCall = tuple[str, tuple[Any, ...]]  # the name of an op in torch.ops.maefast and its arguments


def leaves(values: dict[str, Tensor], dtypes: Dtypes) -> Inputs:
    """Cast the values in order, those past the last dtype to it; leave out those of dtype None."""
    wanted = dtypes + dtypes[-1:] * len(values)
    return {k: t.to(d).requires_grad_() for (k, t), d in zip(values.items(), wanted, strict=False) if d is not None}


def shapes(*sizes: tuple[int, ...]) -> list[Size]:
    return [{"shape": size} for size in sizes]


def make_layer_norm(dtypes: Dtypes, shape: tuple[int, ...]) -> Inputs:
    D = shape[-1]
    return leaves({"x": 2 * torch.randn(shape) + 1, "weight": 1 + torch.randn(D), "bias": torch.randn(D)}, dtypes[:2])


def layer_norm(dtypes: Dtypes, shape: tuple[int, ...] = (), eps: float = EPS) -> Op:
    """Return the op with a result of the last dtype, fp64 for the exact one."""
    return lambda x, weight, bias: ops.layer_norm(x, weight, bias, eps, F64 if x.dtype == F64 else dtypes[-1])


def native_layer_norm(inputs: Inputs, dtypes: Dtypes, shape: tuple[int, ...]) -> Iterator[NativeCall]:
    x, weight, bias = inputs.values()
    yield "layer_norm_fwd", (x, weight, bias, EPS, dtypes[-1])
    _, center, rstd = torch.ops.maefast.layer_norm_fwd(x, weight, bias, EPS, F32)
    dy = torch.randn(shape)
    for dresidual, y_dtype, cast_dtype in ((None, None, None), (dy, BF16, None), (dy.half(), None, F16)):
        yield "layer_norm_bwd", (dy, dresidual, x, weight, bias, center, rstd, y_dtype, cast_dtype, y_dtype is None)


def make_add_layer_norm(dtypes: Dtypes, shape: tuple[int, ...]) -> Inputs:
    D = shape[-1]
    values = {"x": torch.randn(shape), "residual": 2 * torch.randn(shape) + 1}
    return leaves(values | {"weight": 1 + torch.randn(D), "bias": torch.randn(D)}, dtypes[:3])


def add_layer_norm(dtypes: Dtypes, shape: tuple[int, ...] = (), outputs: tuple[int, ...] = (0, 1)) -> Op:
    """Return the op with chosen outputs joined, the normalised sum in the last dtype or fp64."""

    def op(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        both = ops.add_layer_norm(x, residual, weight, bias, EPS, F64 if x.dtype == F64 else dtypes[-1])
        return torch.cat([both[i] for i in outputs])

    return op


def native_add_layer_norm(inputs: Inputs, dtypes: Dtypes, shape: tuple[int, ...]) -> Iterator[NativeCall]:
    yield "add_layer_norm_fwd", (*inputs.values(), EPS, dtypes[-1])


def make_bias_gelu(dtypes: Dtypes, shape: tuple[int, ...]) -> Inputs:
    return leaves({"x": 2 * torch.randn(shape), "bias": torch.randn(shape[-1])}, dtypes)


def native_bias_gelu(inputs: Inputs, dtypes: Dtypes, shape: tuple[int, ...]) -> Iterator[NativeCall]:
    x, bias = inputs["x"], inputs.get("bias")
    yield "bias_gelu_fwd", (x, bias)
    for with_y in (False, True):
        yield "bias_gelu_bwd", (torch.randn(shape), x, bias, with_y)


def make_linear(dtypes: Dtypes, shape: tuple[int, ...], features: int) -> Inputs:
    """Make x of `shape` and a weight from its last dimension to `features`."""
    x, weight, bias = torch.randn(shape), torch.randn(features, shape[-1]), torch.randn(features)
    return leaves({"x": x, "weight": weight, "bias": bias}, (dtypes[0], *dtypes))


def native_linear(inputs: Inputs, dtypes: Dtypes, **size: Any) -> Iterator[NativeCall]:
    x, weight, bias = inputs["x"], inputs["weight"], inputs.get("bias")
    for options in ((True,), (False,), (False, F32)):
        yield "linear_fwd", (x, weight, bias, *options)


def make_attention(dtypes: Dtypes, N: int, T: int, h: int, d: int, M: int | None = None) -> Inputs:
    """Make packed projections; with M, keys and values packed and queries apart."""
    if M is None:
        return leaves({"qkv": torch.randn(N, T, 3 * h * d)}, dtypes)
    return leaves({"qkv": torch.randn(N, T, 2 * h * d), "q": torch.randn(N, M, h * d)}, dtypes)


def attention(dtypes: Dtypes, h: int, **size: Any) -> Op:
    return lambda qkv, q=None: ops.attention(qkv, h, q)


def native_attention(inputs: Inputs, dtypes: Dtypes, h: int, d: int, **size: Any) -> Iterator[NativeCall]:
    q, qkv = inputs.get("q"), inputs["qkv"]
    yield "attention_fwd", (q, qkv, h)
    dout = torch.randn(*(qkv if q is None else q).shape[:2], h * d).to(dtypes[0])
    yield "attention_bwd", (dout, q, qkv, None, None, h, q is None)


def make_unshuffle(dtypes: Dtypes, N: int, L: int, K: int, D: int) -> Inputs:
    x, mask_token, pos_embed = torch.randn(N, 1 + K, D), torch.randn(1, 1, D), torch.randn(1, 1 + L, D)
    inputs = leaves({"x": x, "mask_token": mask_token, "pos_embed": pos_embed}, dtypes)
    return {"x": inputs.pop("x"), "ids_restore": permutations(N, L), **inputs}


def native_unshuffle(inputs: Inputs, dtypes: Dtypes, N: int, L: int, K: int, D: int) -> Iterator[NativeCall]:
    yield "unshuffle_fwd", tuple(inputs.values())
    for dtype in (BF16, F16):
        yield "unshuffle_bwd", (torch.randn(N, 1 + L, D), inputs["ids_restore"], K, dtype)


WEIGHTS = {
    "mask": lambda N, L: removed_mask(N, L, L // 3),
    "ones": torch.ones,
    "any": lambda N, L: torch.rand(N, L) * removed_mask(N, L, L // 3) * 7 + 0.01,
    "one_patch": lambda N, L: torch.eye(N * L)[3].reshape(N, L),
}


def make_masked_mse(dtypes: Dtypes, patch, C=3, N=2, grid=(3, 4), weights="mask", compact=False, norm_pix=True) -> Inputs:
    """Make pred, images and mask; uint8 images come with statistics."""
    L, P = grid[0] * grid[1], C * patch[0] * patch[1]
    mask = WEIGHTS[weights](N, L)
    pred = torch.randn(N, int(mask[0].sum()) if compact else L, P).to(dtypes[0]).requires_grad_()
    shape = (N, C, grid[0] * patch[0], grid[1] * patch[1])
    if dtypes[1] != U8:
        return {"pred": pred, "imgs": torch.randn(shape).to(dtypes[1]), "mask": mask}
    imgs = torch.randint(256, shape, dtype=U8)
    return {"pred": pred, "imgs": imgs, "mask": mask, "mean": torch.rand(C), "std": torch.rand(C) + 0.2}


def masked_mse(dtypes: Dtypes, patch: tuple[int, int], norm_pix: bool = True, **size: Any) -> Op:
    return lambda pred, imgs, mask, mean=None, std=None: ops.masked_mse(pred, imgs, mask, patch, norm_pix, mean, std)


def exact_masked_mse(inputs: Inputs) -> Inputs:
    imgs = widened(inputs["imgs"], inputs.get("mean"), inputs.get("std"))
    return {"pred": inputs["pred"].double(), "imgs": imgs, "mask": inputs["mask"]}


def native_masked_mse(inputs: Inputs, dtypes: Dtypes, patch, norm_pix=True, **size: Any) -> Iterator[NativeCall]:
    pred, imgs, mask, *statistics = inputs.values()
    args = (pred, imgs, mask, *patch, norm_pix, *(statistics or (None, None)))
    yield "masked_mse_fwd", args
    yield "masked_mse_bwd", (torch.tensor(0.7), *args)


def make_block(dtypes: Dtypes, N: int = 2, T: int = 9, pending: bool = True) -> Inputs:
    """Make inputs whose norms have parameters of the first dtype, and all else the last."""
    D = BLOCK_WIDTH
    widths = {"norm1": (D,), "qkv": (3 * D, D), "proj": (D, D), "norm2": (D,), "fc1": (HIDDEN, D), "fc2": (D, HIDDEN)}
    inputs = {name: torch.randn(N, T, D).to(dtypes[-1]) for name in (("x", "pending") if pending else ("x",))}
    for name, shape in widths.items():
        weight = torch.randn(shape) * (1 if len(shape) == 1 else shape[-1] ** -0.5)
        dtype = dtypes[0 if name.startswith("norm") else -1]
        inputs |= {f"{name}_weight": weight.to(dtype), f"{name}_bias": torch.randn(shape[0]).to(dtype)}
    return {name: t.requires_grad_() for name, t in inputs.items()}


def block(dtypes: Dtypes = (), **size: Any) -> Op:
    """Return the op with its two results joined."""

    def op(x: Tensor, pending: Tensor | None = None, **weights: Tensor) -> Tensor:
        stream, branch = ops.transformer_block(x, pending, BlockWeights(**weights), HEADS, EPS)
        return torch.cat([stream, branch.to(stream.dtype)])

    return op


def same(count: int) -> dict[str, Dtypes]:
    """One dtype for all of `count` inputs."""
    return {name: (dtype,) * count for name, dtype in (("fp32", F32), ("bf16", BF16), ("fp16", F16))}


SAME = same(1)
# Of layer_norm: x, weight and bias, result.
NORM_DTYPES = same(3) | {"autocast": (F32, F32, BF16), "fp32_parameters": (BF16, F32, BF16)}
NORM_DTYPES |= {"bf16_parameters": (F32, BF16, F16), "widening": (F16, BF16, F32)}
# Of add_layer_norm: x, residual, weight and bias, result; under autocast x and the result are bf16.
ADD_NORM_DTYPES = same(4) | {"autocast": (BF16, F32, F32, BF16)}
ADD_NORM_DTYPES |= {"bf16_residual": (F32, BF16, F32, F32), "two_halves": (F16, BF16, BF16, F16)}
# Of bias_gelu: x, bias.
GELU_DTYPES = same(2) | {"fp32_bias": (BF16, F32), "bf16_bias": (F32, BF16), "no_bias": (F32, None), "no_bias_bf16": (BF16, None)}
# Of linear: x and weight, bias.
LINEAR_DTYPES = same(2) | {"no_bias": (F32, None), "no_bias_bf16": (BF16, None), "no_bias_fp16": (F16, None)}
# Of unshuffle: x, mask_token, pos_embed; autocast casts only x, two halves are promoted to fp32.
UNSHUFFLE_DTYPES = same(3) | {"autocast": (BF16, F32, F32), "autocast_fp16": (F16, F32, F32)}
UNSHUFFLE_DTYPES |= {"mixed": (F32, BF16, F16), "halves": (F16, BF16, F16)}
# Of masked_mse: pred, imgs.
MSE_DTYPES = same(2) | {"autocast": (BF16, F32), "fp32_bf16": (F32, BF16), "bf16_fp16": (BF16, F16)}
MSE_DTYPES |= {"fp32_uint8": (F32, U8), "bf16_uint8": (BF16, U8), "fp16_uint8": (F16, U8)}
# Of transformer_block: norms, everything else.
BLOCK_DTYPES = SAME | {"fp32_norms": (F32, BF16)}
