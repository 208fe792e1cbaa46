"""The Triton backend against float64, on a GPU or in the interpreter, which is wrong for bf16."""

from collections.abc import Callable

import torch
from torch import Tensor

import maefast
from maefast import ops
from maefast.kernels import INTERPRETED
from maefast.testing.errors import assert_close_to_float64

DEVICE = "cpu" if INTERPRETED else "cuda"
F32, F16, BF16, U8 = torch.float32, torch.float16, torch.bfloat16, torch.uint8
FLOATS = [F32, F16] if INTERPRETED else [F32, F16, BF16]

Tensors = dict[str, Tensor]
Op = Callable[..., Tensor | tuple[Tensor, ...]]
Incoming = Tensor | tuple[Tensor | None, ...] | None  # one for every output, or one of each; None for 0.37


def random(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    if dtype == U8:
        return torch.randint(256, shape, dtype=U8, device=DEVICE)
    return torch.randn(shape, device=DEVICE).to(dtype)


def permutations(N: int, L: int) -> Tensor:
    return torch.rand(N, L, device=DEVICE).argsort(dim=1)


def widened(inputs: Tensors) -> Tensors:
    """Float64 inputs; uint8 images by the formula (x/255 - mean)/std, without their statistics."""
    wide = {name: t.detach().double() if t.is_floating_point() and name != "mask" else t for name, t in inputs.items()}
    if "imgs" in inputs and inputs["imgs"].dtype == U8:
        pixels = inputs["imgs"].double() / 255
        mean, std = wide.pop("mean", None), wide.pop("std", None)
        wide["imgs"] = pixels if mean is None else (pixels - mean[:, None, None]) / std[:, None, None]
    return {name: t.requires_grad_(inputs[name].requires_grad) for name, t in wide.items()}


def outputs(op: Op, inputs: Tensors, dy: Incoming) -> Tensors:
    """Return outputs, and gradients as d_<name>; None in a tuple `dy` leaves that output unused."""
    leaves = {name: t for name, t in inputs.items() if t.requires_grad}
    out = op(**inputs)
    outs = out if isinstance(out, tuple) else (out,)
    results = {f"out{i}": t.detach() for i, t in enumerate(outs)}
    if not leaves:
        return results
    dys = dy if isinstance(dy, tuple) else tuple(torch.full_like(t, 0.37) if dy is None else dy for t in outs)
    used = [(t, grad.to(t.dtype)) for t, grad in zip(outs, dys, strict=True) if grad is not None]
    grads = torch.autograd.grad([t for t, _ in used], list(leaves.values()), [grad for _, grad in used], allow_unused=True)
    return results | {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}


def step_inputs(N: int) -> list[Tensor]:
    shapes = ((N, 6), (N, 3, 4, 6), (N, 3, 8), (1, 1, 8), (1, 7, 8), (N, 6, 12), (8,), (8,))
    return [random(*shape).requires_grad_(i in (2, 3, 5, 6, 7)) for i, shape in enumerate(shapes)]


def step(
    noise: Tensor, imgs: Tensor, x: Tensor, mask_token: Tensor, pos_embed: Tensor, pred: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    """Every op but attention and products, one after the other."""
    ids_keep, ids_restore, mask = ops.random_masking(noise, 2)
    y = ops.unshuffle(x, ids_restore, mask_token, pos_embed)
    normed, total = ops.add_layer_norm(ops.layer_norm(y, weight, bias), y, weight, bias)
    return ops.gather_patches(imgs, ids_keep, 2), ops.bias_gelu(normed), total, ops.masked_mse(pred, imgs, mask, 2, True)


def run_step(function: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], backend: str) -> list[Tensor]:
    """Return the outputs and every gradient."""
    with maefast.backend(backend):
        patches, *outs = function(*inputs)
        leaves, dys = [t for t in inputs if t.requires_grad], [out.detach().cos() for out in outs]
        return [t.detach() for t in (patches, *outs, *torch.autograd.grad(outs, leaves, dys))]


def check(op: Op, *cases: Tensors, dy: Incoming = None, exact: Op | None = None) -> None:
    """Hold Triton to the error rule, and on a GPU to the same bits twice.

    `exact` is the op in float64 if it needs other arguments. The results of all `cases` (inputs of
    one shape) are one tensor, as eager may be exact for a single number.
    """
    results: dict[str, list[Tensors]] = {"triton": [], "eager": [], "exact": []}
    for inputs in cases:
        with maefast.backend("triton"):
            got = outputs(op, inputs, dy)
            again = got if INTERPRETED else outputs(op, inputs, dy)
        for name, value in got.items():
            assert torch.equal(value, again[name]), f"{name}: two runs differ"
        results["triton"].append(got)
        with maefast.backend("eager"):
            results["eager"].append(outputs(op, inputs, dy))
            results["exact"].append(outputs(exact or op, widened(inputs), dy))
    for name in results["triton"][0]:
        got, eager, truth = (torch.stack([case[name] for case in results[key]]) for key in ("triton", "eager", "exact"))
        assert got.dtype == eager.dtype, f"{name}: triton gives {got.dtype}, eager {eager.dtype}"
        assert_close_to_float64(name, got, eager, truth.double())
