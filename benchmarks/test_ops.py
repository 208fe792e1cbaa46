"""The ops against plain torch as in ReferenceMAE, at ViT-B/16 shapes: forward and backward."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import traffic
from opbench import OURS, Inputs, OpEntry, OpWorkload, Outputs, workloads_of
from rotation import ReplayClock
from torch import Tensor

from maefast import ops
from maefast.backbone import IMAGENET_MEAN, IMAGENET_STD
from maefast.reference import VAR_EPS

CLOCK = ReplayClock()
PATCH, GRID = 16, 14
L, K, D, P = GRID * GRID, GRID * GRID // 4, 512, 3 * PATCH * PATCH
MLP_RATIO, LN_EPS = 4, 1e-6
TOKENS = {  # and width: the decoder's without a name, the encoders of ViT-B/16, L/16 and H/14
    "": (1 + L, D),
    "encoder": (1 + K, 768),
    "encoder_large": (50, 1024),
    "encoder_huge": (65, 1280),
}
NORM_VARIANTS = ("fp32", "bf16", "autocast", "fp32-encoder", "bf16-encoder", "autocast-encoder")
NORM_VARIANTS += ("autocast-encoder_large", "autocast-encoder_huge")
QUICK_N, FULL_N = 8, 64


def workloads(full: bool, device: torch.device) -> list[OpWorkload]:
    return [
        workload
        for entry in ENTRIES
        for variant in entry.variants
        if full or "encoder" not in variant
        if device.type == "cuda" or not variant.endswith(("large", "huge"))
        for workload in workloads_of(entry, variant, device, full, QUICK_N, FULL_N)
    ]


@pytest.mark.benchmark(timer=CLOCK)
def test_op(benchmark, replay, workload, contender):
    replay(benchmark, CLOCK, workload, contender)


def make_images(N: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    shape = (N, 3, GRID * PATCH, GRID * PATCH)
    if dtype == torch.uint8:
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return torch.randn(shape, generator=generator).to(dtype)


def normalisation(variant: str) -> Inputs:
    """Return the mean and std that uint8 images need, ImageNet's."""
    statistics = {"mean": torch.tensor(IMAGENET_MEAN), "std": torch.tensor(IMAGENET_STD)}
    return statistics if variant == "uint8" else {}


def sizes(inputs: Inputs, *names: str) -> list[int]:
    """Return the bytes per element of these inputs, 0 for an absent one."""
    return [inputs[name].itemsize if name in inputs else 0 for name in names]


def as_float(imgs: Tensor, mean: Tensor | None, std: Tensor | None) -> Tensor:
    if mean is None or std is None:
        return imgs
    return (imgs.to(mean.dtype) / 255 - mean[:, None, None]) / std[:, None, None]


# masking: random_masking + gather_patches


def make_masking(N: int, variant: str, generator: torch.Generator) -> Inputs:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "uint8": torch.uint8}[variant]
    return {"noise": torch.rand(N, L, generator=generator), "imgs": make_images(N, dtype, generator), **normalisation(variant)}


def plain_masking(noise: Tensor, imgs: Tensor, mean: Tensor | None = None, std: Tensor | None = None) -> Outputs:
    """Argsort twice, patchify the whole image in conv-weight order, gather."""
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1, stable=True)
    ids_keep = ids_shuffle[:, :K]
    mask = torch.ones(noise.shape, device=noise.device)
    mask[:, :K] = 0
    N, C = imgs.shape[:2]
    patches = as_float(imgs, mean, std).reshape(N, C, GRID, PATCH, GRID, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(N, L, P)
    patches = patches.gather(1, ids_keep[..., None].expand(-1, -1, P))
    return {"patches": patches, "ids_keep": ids_keep, "ids_restore": ids_restore, "mask": mask.gather(1, ids_restore)}


def fused_masking(noise: Tensor, imgs: Tensor, mean: Tensor | None = None, std: Tensor | None = None) -> Outputs:
    patches, ids_keep, ids_restore, mask = ops.mask_patches(imgs, noise, K, PATCH, mean, std)
    return {"patches": patches, "ids_keep": ids_keep, "ids_restore": ids_restore, "mask": mask}


# unshuffle; "autocast": x in bf16, token and positions in fp32, as in a step under autocast


def make_unshuffle(N: int, variant: str, generator: torch.Generator) -> Inputs:
    x_dtype = torch.float32 if variant == "fp32" else torch.bfloat16
    dtype = torch.bfloat16 if variant == "bf16" else torch.float32
    rand = partial(torch.randn, generator=generator)
    return {
        "x": rand(N, 1 + K, D).to(x_dtype),
        "ids_restore": torch.rand(N, L, generator=generator).argsort(dim=1).argsort(dim=1),
        "mask_token": rand(1, 1, D).to(dtype),
        "pos_embed": rand(1, 1 + L, D).to(dtype),
        "dy": rand(N, 1 + L, D).to(dtype),
    }


def plain_unshuffle(x: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor) -> Outputs:
    """Append mask tokens, gather into image order, put the class token in front, add positions."""
    tokens = torch.cat([x[:, 1:], mask_token.expand(x.shape[0], L - K, -1)], dim=1)
    tokens = tokens.gather(1, ids_restore[..., None].expand(-1, -1, D))
    return {"y": torch.cat([x[:, :1], tokens], dim=1) + pos_embed}


# masked_mse, normalised target; "autocast": pred in bf16, images in fp32


def make_masked_mse(N: int, variant: str, generator: torch.Generator) -> Inputs:
    pred_dtype = torch.bfloat16 if variant in ("bf16", "autocast") else torch.float32
    return {
        "pred": torch.randn(N, L, P, generator=generator).to(pred_dtype),
        "imgs": make_images(N, {"bf16": torch.bfloat16, "uint8": torch.uint8}.get(variant, torch.float32), generator),
        "mask": (torch.rand(N, L, generator=generator).argsort(dim=1).argsort(dim=1) >= K).float(),
        **normalisation(variant),
    }


def plain_masked_mse(pred: Tensor, imgs: Tensor, mask: Tensor, mean: Tensor | None = None, std: Tensor | None = None) -> Outputs:
    """Patchify, normalise each patch, square, average over the removed ones."""
    N, C = imgs.shape[:2]
    target = as_float(imgs, mean, std).reshape(N, C, GRID, PATCH, GRID, PATCH).permute(0, 2, 4, 3, 5, 1).reshape(N, L, P)
    center, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
    target = (target - center) / (var + VAR_EPS) ** 0.5
    return {"loss": (((pred - target) ** 2).mean(dim=-1) * mask).sum() / mask.sum()}


def fused_masked_mse(pred: Tensor, imgs: Tensor, mask: Tensor, mean: Tensor | None = None, std: Tensor | None = None) -> Outputs:
    return {"loss": ops.masked_mse(pred, imgs, mask, PATCH, True, mean, std)}


# layer_norm and add_layer_norm on the decoder's tokens; at full size also on those of encoders.
# "autocast": the residual stream in fp32, inputs and outputs of GEMMs in bf16


def rows_and_width(N: int, variant: str) -> tuple[int, int]:
    tokens, width = TOKENS[variant.partition("-")[2]]
    return N * tokens, width


def make_layer_norm(N: int, variant: str, generator: torch.Generator) -> Inputs:
    shape = rows_and_width(N, variant)
    dtype = torch.bfloat16 if variant.startswith("bf16") else torch.float32
    gemm_dtype = torch.bfloat16 if variant.startswith("autocast") else dtype
    rand = partial(torch.randn, generator=generator)
    return {
        "x": rand(shape).to(dtype),
        "weight": (1 + rand(shape[1])).to(dtype),
        "bias": rand(shape[1]).to(dtype),
        "out": torch.empty(0, dtype=gemm_dtype),  # for its dtype
        "dy": rand(shape).to(gemm_dtype),
    }


def plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Outputs:
    """Normalise in the dtype of x, then cast to that of the GEMM."""
    return {"y": F.layer_norm(x, x.shape[-1:], weight, bias, LN_EPS).to(out.dtype)}


def make_add_layer_norm(N: int, variant: str, generator: torch.Generator) -> Inputs:
    inputs = make_layer_norm(N, variant, generator)
    residual = inputs["x"]
    x, dtotal = (torch.randn(residual.shape, generator=generator) for _ in range(2))
    return inputs | {"x": x.to(inputs["out"].dtype), "residual": residual, "dtotal": dtotal.to(residual.dtype)}


def plain_add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Outputs:
    total = x + residual
    return plain_layer_norm(total, weight, bias, out) | {"total": total}


def fused_add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Outputs:
    y, total = ops.add_layer_norm(x, residual, weight, bias, LN_EPS, out.dtype)
    return {"y": y, "total": total}


# gelu: bias_gelu in the MLP, behind a GEMM that adds the bias; "autocast": with a bias in fp32


def make_gelu(N: int, variant: str, generator: torch.Generator) -> Inputs:
    rows, width = rows_and_width(N, variant)
    dtype = torch.float32 if variant.startswith("fp32") else torch.bfloat16
    x, dy = (torch.randn(rows, MLP_RATIO * width, generator=generator).to(dtype) for _ in range(2))
    return {"x": x, "dy": dy} | ({"bias": torch.randn(MLP_RATIO * width, generator=generator)} if variant == "autocast" else {})


def plain_gelu(x: Tensor, bias: Tensor | None = None) -> Outputs:
    return {"y": F.gelu(x if bias is None else x + bias).to(x.dtype)}


ENTRIES = (
    OpEntry(
        name="masking",
        variants=("fp32", "bf16", "uint8"),
        make=make_masking,
        plain=plain_masking,
        fused=fused_masking,
        leaves=(),
        ops=("random_masking", "gather_patches", "mask_patches"),
        bytes=lambda N, x, y: traffic.masking_bytes(N, L, K, P, x["imgs"].itemsize, y["patches"].itemsize),
    ),
    OpEntry(
        name="unshuffle",
        variants=("fp32", "bf16", "autocast"),
        make=make_unshuffle,
        plain=plain_unshuffle,
        fused=lambda x, ids_restore, mask_token, pos_embed: {"y": ops.unshuffle(x, ids_restore, mask_token, pos_embed)},
        leaves=("x", "mask_token"),
        ops=("unshuffle",),
        bytes=lambda N, x, y: traffic.unshuffle_bytes(N, L, K, D, *sizes(x, "x", "mask_token"), y["y"].itemsize),
        flops=lambda N: traffic.unshuffle_flops(N, L, K, D),
    ),
    OpEntry(
        name="masked_mse",
        variants=("fp32", "bf16", "uint8", "autocast"),
        make=make_masked_mse,
        plain=plain_masked_mse,
        fused=fused_masked_mse,
        leaves=("pred",),
        ops=("masked_mse",),
        bytes=lambda N, x, y: traffic.masked_mse_bytes(N, L, K, P, *sizes(x, "pred", "imgs")),
        flops=lambda N: traffic.masked_mse_flops(N, L, K, P),
    ),
    OpEntry(
        name="layer_norm",
        variants=NORM_VARIANTS,
        make=make_layer_norm,
        plain=plain_layer_norm,
        fused=lambda x, weight, bias, out: {"y": ops.layer_norm(x, weight, bias, LN_EPS, out.dtype)},
        leaves=("x", "weight", "bias"),
        ops=("layer_norm",),
        bytes=lambda N, x, y: traffic.layer_norm_bytes(*x["x"].shape, *sizes(x, "x", "weight"), y["y"].itemsize),
        backends=(*OURS, "apex", "eager"),
    ),
    OpEntry(
        name="add_layer_norm",
        variants=NORM_VARIANTS,
        make=make_add_layer_norm,
        plain=plain_add_layer_norm,
        fused=fused_add_layer_norm,
        leaves=("x", "residual", "weight", "bias"),
        ops=("add_layer_norm",),
        bytes=lambda N, x, y: traffic.add_layer_norm_bytes(*x["x"].shape, *sizes(x, "x", "residual", "weight"), y["y"].itemsize),
    ),
    OpEntry(
        name="gelu",
        variants=("fp32", "bf16", "autocast", "fp32-encoder", "bf16-encoder", "bf16-encoder_large", "bf16-encoder_huge"),
        make=make_gelu,
        plain=plain_gelu,
        fused=lambda x, bias=None: {"y": ops.bias_gelu(x, bias)},
        leaves=("x", "bias"),
        ops=("bias_gelu",),
        bytes=lambda N, x, y: traffic.bias_gelu_bytes(*x["x"].shape, *sizes(x, "x", "bias")),
    ),
)
