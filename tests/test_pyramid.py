"""SimpleFeaturePyramid: scales, plain torch in float64, gradients into the encoder, bad input."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support import BATCHES, IMAGES, Batch, Results, assert_results
from torch import Tensor

from maefast import SimpleFeaturePyramid, VisionTransformer


def plain(pyramid: SimpleFeaturePyramid, x: Tensor, by_hand: bool = True) -> list[Tensor]:
    """The four maps from the same weights, in plain torch; by_hand: LayerNorm by its formula."""

    def norm(x: Tensor, at: str) -> Tensor:
        if not by_hand:
            return F.layer_norm(x.movedim(1, -1), x.shape[1:2], p[f"{at}.weight"], p[f"{at}.bias"], 1e-6).movedim(-1, 1)
        mean, var = x.mean(dim=1, keepdim=True), x.var(dim=1, unbiased=False, keepdim=True)
        weight, bias = (p[f"{at}.{kind}"][:, None, None] for kind in ("weight", "bias"))
        return (x - mean) / (var + 1e-6).sqrt() * weight + bias

    def doubled(x: Tensor, at: str) -> Tensor:
        return F.conv_transpose2d(x, p[f"{at}.weight"], p[f"{at}.bias"], stride=2)

    p = dict(pyramid.named_parameters())
    levels = [
        (4, doubled(F.gelu(norm(doubled(x, "levels.0.0"), "levels.0.1")), "levels.0.3")),
        (1, doubled(x, "levels.1.0")),
        (0, x),
        (1, F.max_pool2d(x, 2)),
    ]
    maps = []
    for i, (first, y) in enumerate(levels):
        y = norm(F.conv2d(y, p[f"levels.{i}.{first}.weight"]), f"levels.{i}.{first + 1}")
        y = F.conv2d(y, p[f"levels.{i}.{first + 2}.weight"], padding=1)
        maps.append(norm(y, f"levels.{i}.{first + 3}"))
    return maps


def run(call: object, pyramid: SimpleFeaturePyramid, x: Tensor) -> Results:
    """Return the maps, and the gradients of the input and of every parameter."""
    pyramid.zero_grad()
    x = x.detach().requires_grad_()
    maps = call(x)
    generator = torch.Generator().manual_seed(2)
    sum((m * torch.randn(m.shape, generator=generator).to(m.dtype)).sum() for m in maps).backward()
    named = {f"map {i}": m.detach() for i, m in enumerate(maps)}
    return named | {"x": x.grad} | {name: p.grad for name, p in pyramid.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_against_float64(dtype):
    pyramid = SimpleFeaturePyramid(16, 12)
    for p in pyramid.parameters():
        torch.nn.init.normal_(p, std=0.4)
    pyramid.to(dtype)
    eager, exact = copy.deepcopy(pyramid), copy.deepcopy(pyramid).double()

    def batch(seed: int) -> Batch:
        x = torch.randn(IMAGES, 16, 5, 6).to(dtype)
        theirs = [run(partial(plain, eager, by_hand=by_hand), eager, x) for by_hand in (True, False)]
        return run(pyramid, pyramid, x), theirs, run(partial(plain, exact), exact, x.double())

    assert_results(map(batch, range(BATCHES)))


def test_scales():
    """Strides p/4, p/2, p and 2p; an odd size is rounded down in the last."""
    maps = SimpleFeaturePyramid(8, 6)(torch.randn(1, 8, 5, 8))
    assert [tuple(m.shape) for m in maps] == [(1, 6, 20, 32), (1, 6, 10, 16), (1, 6, 5, 8), (1, 6, 2, 4)]


def test_gradients_reach_the_whole_encoder():
    encoder = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0)
    pyramid = SimpleFeaturePyramid(16, 8)
    maps = pyramid(encoder.features(torch.randn(2, 3, 48, 32))[0])
    sum(m.square().sum() for m in maps).backward()
    without = {name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {"norm.weight", "norm.bias"}


@pytest.mark.parametrize("shape", [(2, 8, 4), (2, 7, 4, 4), (2, 8, 1, 4)], ids=str)
def test_maps_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"x must be \(N, 8, h, w\) with h and w 2 or more; its shape is"):
        SimpleFeaturePyramid(8)(torch.randn(shape))


@pytest.mark.parametrize("dim", [0, 6])
def test_widths_that_do_not_fit(dim):
    with pytest.raises(ValueError, match=f"dim must be a positive multiple of 4; it is {dim}"):
        SimpleFeaturePyramid(dim)
