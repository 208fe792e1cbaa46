"""Feature maps of VisionTransformer for images of any size, against positions resized by hand."""

import copy

import numpy as np
import pytest
import torch
from encoders import plain_vit, small_vit, with_random_weights
from support import BATCHES, IMAGES, Batch, Results, assert_results, attends_otherwise, widened
from torch import Tensor, nn

from maefast import VisionTransformer

U8 = torch.uint8
GRID = (8, 3)


def cubic(n: int, m: int) -> Tensor:
    """(m, n) float64: row i weighs n values for the i-th of m (Keys 1981, a = -0.75)."""
    weights = np.zeros((m, n))
    for i in range(m):
        at = (i + 0.5) * n / m - 0.5
        for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            d = abs(at - j)
            near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            weights[i, min(max(j, 0), n - 1)] += near if d <= 1 else far
    return torch.from_numpy(weights)


def resized(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    table = pos_embed[0, 1:].view(*GRID, -1)
    table = torch.einsum("ai,bj,ijd->abd", *[cubic(n, m).to(pos_embed.dtype) for n, m in zip(GRID, grid, strict=True)], table)
    return torch.cat([pos_embed[:, :1], table.flatten(0, 1)[None]], dim=1)


def maps_of(model: nn.Module, imgs: Tensor, indices: list[int], seed: int) -> Results:
    """Feature maps after some blocks, and all gradients for fixed gradients of these."""
    grid = (imgs.shape[2] // 8, imgs.shape[3] // 16)
    model.zero_grad()
    if isinstance(model, VisionTransformer):
        maps = model.features(imgs, indices)
    else:
        outputs = model.tokens(imgs, resized(model.pos_embed, grid))
        maps = [outputs[i][:, 1:].transpose(1, 2).reshape(len(imgs), -1, *grid) for i in indices]
    generator = torch.Generator().manual_seed(seed)
    sum((m * torch.randn(m.shape, generator=generator).to(m.dtype)).sum() for m in maps).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return grads | {f"map {i}": m.detach() for i, m in enumerate(maps)}


@pytest.mark.parametrize("size", [(64, 48), (32, 96), (128, 16), (8, 64), (160, 288)], ids=str)
def test_feature_maps_of_any_size(size):
    """Maps and gradients: the model's own size, wider, higher, a row, 360 patches."""
    model, plain = (with_random_weights(m) for m in (small_vit(), plain_vit()))
    other, exact_model = attends_otherwise(plain), copy.deepcopy(plain).double()
    images = IMAGES if size[0] < 160 else 4

    def run(seed: int) -> Batch:
        imgs = torch.randn(images, 3, *size, generator=torch.Generator().manual_seed(seed))
        got, *eager = (maps_of(m, imgs, [2, 0, -1], seed) for m in (model, plain, other))
        assert got.keys() >= {"pos_embed", "patch_embed.proj.weight", "blocks.2.mlp.fc2.weight"}
        return got, eager, maps_of(exact_model, imgs.double(), [2, 0, -1], seed)

    assert_results(map(run, range(BATCHES)))


def test_blocks_behind_the_last_map_do_not_run():
    model = small_vit()
    seen = []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda module, args, out, i=i: seen.append(i))
    maps = model.features(torch.randn(1, 3, 16, 32), [1, -3])
    assert seen == [0, 1]
    assert [tuple(m.shape) for m in maps] == [(1, 32, 2, 2)] * 2
    assert not torch.equal(*maps)
    assert model.features(torch.randn(1, 3, 16, 32), []) == []


def test_feature_maps_of_uint8_images():
    model = small_vit()
    imgs = torch.randint(256, (2, 3, 24, 64), dtype=U8)
    torch.testing.assert_close(model.features(imgs)[0], model.features(widened(imgs, model.mean, model.std).float())[0])
