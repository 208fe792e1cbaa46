"""The ops against plain torch doing what ReferenceMAE does, at ViT-B/16 shapes: forward, and backward where there is one."""

from functools import partial

import pytest
import torch
import traffic
from opbench import Inputs, OpEntry, OpWorkload, Outputs
from rotation import ReplayClock
from torch import Tensor

from maefast import ops
from maefast.reference import VAR_EPS

CLOCK = ReplayClock()
PATCH, GRID = 16, 14
L, K, D, P = GRID * GRID, GRID * GRID // 4, 512, 3 * PATCH * PATCH
QUICK_N, FULL_N = 8, 64


def workloads(full: bool, device: torch.device) -> list[OpWorkload]:
    make = partial(OpWorkload, N=FULL_N if full else QUICK_N, device=device)
    return [make(entry, variant) for entry in ENTRIES for variant in entry.variants]


@pytest.mark.benchmark(timer=CLOCK)
def test_op(benchmark, replay, workload, contender):
    replay(benchmark, CLOCK, workload, contender)


def make_images(N: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    shape = (N, 3, GRID * PATCH, GRID * PATCH)
    if dtype == torch.uint8:
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return torch.randn(shape, generator=generator).to(dtype)


def normalisation(variant: str) -> Inputs:
    """What the user of uint8 images passes along: ImageNet's mean and standard deviation."""
    if variant != "uint8":
        return {}
    return {"mean": torch.tensor([0.485, 0.456, 0.406]), "std": torch.tensor([0.229, 0.224, 0.225])}


def as_float(imgs: Tensor, mean: Tensor | None, std: Tensor | None) -> Tensor:
    if mean is None or std is None:
        return imgs
    return (imgs.to(mean.dtype) / 255 - mean[:, None, None]) / std[:, None, None]


# masking: random_masking + gather_patches


def make_masking(N: int, variant: str, generator: torch.Generator) -> Inputs:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "uint8": torch.uint8}[variant]
    noise = torch.rand(N, L, generator=generator)
    return {"noise": noise, "imgs": make_images(N, dtype, generator), **normalisation(variant)}


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
    ids_keep, ids_restore, mask = ops.random_masking(noise, K)
    patches = ops.gather_patches(imgs, ids_keep, PATCH, mean, std)
    return {"patches": patches, "ids_keep": ids_keep, "ids_restore": ids_restore, "mask": mask}


def asks_masking(inputs: Inputs) -> dict[str, Inputs]:
    ids = inputs["noise"].argsort(dim=1)[:, :K]
    return {
        "random_masking": {"noise": inputs["noise"]},
        "gather_patches": {"imgs": inputs["imgs"], "ids": ids} | {k: inputs[k] for k in ("mean", "std") if k in inputs},
    }


# unshuffle; "autocast": x in bf16, token and positions in fp32, as a training step under autocast has them


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
    """Mask tokens after the kept ones, gather into image order, class token in front, positions added."""
    tokens = torch.cat([x[:, 1:], mask_token.expand(x.shape[0], L - K, -1)], dim=1)
    tokens = tokens.gather(1, ids_restore[..., None].expand(-1, -1, D))
    return {"y": torch.cat([x[:, :1], tokens], dim=1) + pos_embed}


def fused_unshuffle(x: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor) -> Outputs:
    return {"y": ops.unshuffle(x, ids_restore, mask_token, pos_embed)}


# masked_mse, normalised target; "autocast": pred in bf16, images in fp32


def make_masked_mse(N: int, variant: str, generator: torch.Generator) -> Inputs:
    pred_dtype = torch.bfloat16 if variant in ("bf16", "autocast") else torch.float32
    img_dtype = {"bf16": torch.bfloat16, "uint8": torch.uint8}.get(variant, torch.float32)
    return {
        "pred": torch.randn(N, L, P, generator=generator).to(pred_dtype),
        "imgs": make_images(N, img_dtype, generator),
        "mask": (torch.rand(N, L, generator=generator).argsort(dim=1).argsort(dim=1) >= K).float(),
        **normalisation(variant),
    }


def plain_masked_mse(pred: Tensor, imgs: Tensor, mask: Tensor, mean: Tensor | None = None, std: Tensor | None = None) -> Outputs:
    """Patchify, normalise each patch, square, average over the removed ones."""
    N, C = imgs.shape[:2]
    target = as_float(imgs, mean, std).reshape(N, C, GRID, PATCH, GRID, PATCH).permute(0, 2, 4, 3, 5, 1).reshape(N, L, P)
    center, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
    target = (target - center) / (var + VAR_EPS) ** 0.5
    loss = ((pred - target) ** 2).mean(dim=-1)
    return {"loss": (loss * mask).sum() / mask.sum()}


def fused_masked_mse(pred: Tensor, imgs: Tensor, mask: Tensor, mean: Tensor | None = None, std: Tensor | None = None) -> Outputs:
    return {"loss": ops.masked_mse(pred, imgs, mask, PATCH, True, mean, std)}


ENTRIES = (
    OpEntry(
        name="masking",
        variants=("fp32", "bf16", "uint8"),
        make=make_masking,
        plain=plain_masking,
        fused=fused_masking,
        leaves=(),
        asks=asks_masking,
        bytes=lambda N, x, y: traffic.masking_bytes(N, L, K, P, x["imgs"].itemsize, y["patches"].itemsize),
        flops=lambda N: 0,
    ),
    OpEntry(
        name="unshuffle",
        variants=("fp32", "bf16", "autocast"),
        make=make_unshuffle,
        plain=plain_unshuffle,
        fused=fused_unshuffle,
        leaves=("x", "mask_token"),
        asks=lambda x: {"unshuffle": {k: v for k, v in x.items() if k != "dy"}},
        bytes=lambda N, x, y: traffic.unshuffle_bytes(N, L, K, D, x["x"].itemsize, x["mask_token"].itemsize, y["y"].itemsize),
        flops=lambda N: traffic.unshuffle_flops(N, L, K, D),
    ),
    OpEntry(
        name="masked_mse",
        variants=("fp32", "bf16", "uint8", "autocast"),
        make=make_masked_mse,
        plain=plain_masked_mse,
        fused=fused_masked_mse,
        leaves=("pred",),
        asks=lambda x: {"masked_mse": x},
        bytes=lambda N, x, y: traffic.masked_mse_bytes(N, L, K, P, x["pred"].itemsize, x["imgs"].itemsize),
        flops=lambda N: traffic.masked_mse_flops(N, L, K, P),
    ),
)
