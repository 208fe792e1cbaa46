"""Samplers of masks and variants of the model, in plain torch; their checkpoints."""

import random

import pytest
import torch
from checkpoints import HEADS, SQUARE, assert_same_weights
from support import images_for, noise_for, small_mae

from maefast import MAE, checkpoint, ops
from maefast.train.data import pretraining
from maefast.train.evaluate import features, source
from maefast.train.masks import check_sampler, draw_noise
from maefast.train.variants import (
    MaskTokensAndPca,
    MaskTokensInEncoder,
    PcaTarget,
    coefficients_of,
    principal_components,
    variant,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masks(sampler: str, count: int, grid: tuple[int, int], len_keep: int) -> torch.Tensor:
    """(count, rows, columns), 1 = removed."""
    noise = draw_noise(sampler, count, grid, len_keep, seeded())
    assert noise.dtype == torch.float32
    return ops.random_masking(noise, len_keep)[2].view(count, *grid)


def test_random_is_the_draw_of_torch_rand():
    assert torch.equal(draw_noise("random", 3, (4, 6), 6, seeded()), torch.rand(3, 24, generator=seeded()))


def test_grid_keeps_one_corner_of_each_two_by_two():
    kept = 1 - masks("grid", 100, (4, 6), 6)
    corners = kept.view(100, 2, 2, 3, 2).permute(0, 1, 3, 2, 4).reshape(100, 6, 4)
    assert (corners.sum(dim=2) == 1).all()
    assert (corners == corners[:, :1]).all()
    assert (corners[:, 0].sum(dim=0) > 10).all()


@pytest.mark.parametrize(("grid", "len_keep"), [((14, 14), 98), ((14, 14), 49), ((5, 9), 9)])
def test_block_removes_rectangles(grid, len_keep):
    removed = masks("block", 200, grid, len_keep)
    assert (removed.sum(dim=(1, 2)) == grid[0] * grid[1] - len_keep).all()
    share = removed.mean()
    alike = (removed[:, 1:] == removed[:, :-1]).float().mean()
    assert alike > 0.85 > share**2 + (1 - share) ** 2 + 0.1  # what neighbours drawn one by one would have
    noise = draw_noise("block", 200, grid, len_keep, seeded()).view(200, *grid)
    first = noise == noise.amax(dim=(1, 2), keepdim=True)
    height, width = first.any(dim=2).sum(dim=1), first.any(dim=1).sum(dim=1)
    assert torch.equal(first.sum(dim=(1, 2)), height * width)
    assert len(set(zip(height.tolist(), width.tolist(), strict=True))) > 10
    assert (height * width >= 0.7 * 16 / 196 * grid[0] * grid[1]).all()  # rounded sides


def test_what_a_grid_cannot_keep():
    check_sampler("grid", (14, 14), 49)
    check_sampler("block", (7, 7), 24)
    with pytest.raises(ValueError, match="sampler grid must have even numbers of rows and columns of patches; there are 7 x 8"):
        check_sampler("grid", (7, 8), 14)
    with pytest.raises(ValueError, match=r"must keep one patch of four, .* the mask ratio keeps 32 of 64"):
        check_sampler("grid", (8, 8), 32)


class Constant(random.Random):
    """Draws 1.25 and leaves orders as they are: brightness, contrast, saturation."""

    def uniform(self, a, b):
        return 1.25

    def shuffle(self, x):
        pass


def test_colour_jitter():
    grey = torch.tensor([[[100, 60], [100, 60]]], dtype=torch.uint8)
    # 125 and 75, then 100 + 1.25 (x - 100)
    assert pretraining.colour_jitter(grey, Constant()).tolist() == [[[131, 69], [131, 69]]]
    colour = torch.tensor([[[200]], [[80]], [[40]]], dtype=torch.uint8)
    # Brightness: 250, 100, 50 of luma 139.15; contrast: 277.7 -> 255, 90.2, 27.7; saturation: 132.3
    assert pretraining.colour_jitter(colour, Constant()).flatten().tolist() == [255, 79, 2]
    many = torch.randint(256, (5, 8, 8), dtype=torch.uint8, generator=seeded())
    assert len({pretraining.colour_jitter(many, random.Random(i)).sum().item() for i in range(8)}) == 8


def make(cls: type[MAE]) -> MAE:
    model = small_mae(cls, norm_pix_loss=False)
    if isinstance(model, PcaTarget):
        model.find_components(images_for(model, 40, seed=5))
    return model


def test_mask_tokens_in_the_encoder():
    """By the modules and a plain where; all but the decoder's own mask token learns."""
    model = make(MaskTokensInEncoder)
    assert_same_weights({name: t for name, t in model.state_dict().items() if "variant" not in name}, small_mae())
    imgs, noise = images_for(model), noise_for(model)
    out = model(imgs, noise=noise)
    x = torch.where(out.mask[..., None] == 1, model.variant_mask_token, model.patch_embed(imgs))
    x = torch.cat([model.cls_token.expand(2, -1, -1), x], dim=1) + model.pos_embed
    for block in model.blocks:
        x = block(x)
    x = model.decoder_embed(model.norm(x)) + model.decoder_pos_embed
    for block in model.decoder_blocks:
        x = block(x)
    pred = model.decoder_pred(model.decoder_norm(x))[:, 1:]
    torch.testing.assert_close(out.pred, pred)
    torch.testing.assert_close(out.mask, small_mae()(imgs, noise=noise).mask, rtol=0, atol=0)
    error = (pred - model.patchify(imgs)).square().mean(dim=-1)
    torch.testing.assert_close(out.loss, error[out.mask == 1].mean())
    without = model(imgs, noise=noise, return_pred=False)
    assert without.pred is None
    assert torch.equal(without.loss, out.loss)
    out.loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad.isfinite().all() for p in trained.values())
    assert [name for name, p in trained.items() if not p.grad.any()] == ["mask_token"]


def test_principal_components():
    draw = torch.randn(500, 3, generator=seeded()) * torch.tensor([1.0, 5.0, 0.1])
    turn = torch.linalg.qr(torch.randn(3, 3, generator=seeded(1)))[0]
    patches = draw @ turn.T + 7
    mean, basis = principal_components(patches.split(100), 2)
    torch.testing.assert_close(mean, patches.mean(dim=0))
    _, _, directions = torch.linalg.svd(patches - mean, full_matrices=False)
    torch.testing.assert_close((directions[:2] @ basis).abs(), torch.eye(2), atol=1e-4, rtol=0)
    assert [coefficients_of(values) for values in (1, 16, 48, 192, 588, 768)] == [1, 8, 24, 96, 96, 96]


def test_pca_target():
    """The loss is that of the coefficients; of all components, that of the pixels."""
    model = make(PcaTarget)
    imgs, noise = images_for(model, dtype=torch.uint8), noise_for(model)
    out = model(imgs, noise=noise)
    mean, basis = model.variant_pca_mean, model.variant_pca_basis
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-5, rtol=0)
    coefficients = (out.pred - mean) @ basis
    torch.testing.assert_close(mean + coefficients @ basis.T, out.pred)
    wanted = (model.patchify((imgs / 255 - model.mean[:, None, None]) / model.std[:, None, None]) - mean) @ basis
    error = (coefficients - wanted).square().mean(dim=-1)
    torch.testing.assert_close(out.loss, error[out.mask == 1].mean())

    model.variant_pca_basis = torch.linalg.qr(torch.randn(len(mean), len(mean), generator=seeded()))[0]
    model.variant_pca_mean.zero_()
    torch.testing.assert_close(model(imgs, noise=noise).loss, small_mae(norm_pix_loss=False)(imgs, noise=noise).loss)
    with pytest.raises(RuntimeError, match="return_pred=False cannot be honoured: PcaTarget overrides forward_decoder"):
        model(imgs, noise=noise, return_pred=False)


def test_checkpoints_of_variants(tmp_path):
    """Encoder and plain model are read, with a word; the variant is rebuilt for pictures."""
    assert variant(True, "pca") is MaskTokensAndPca
    torch.manual_seed(0)
    model = MaskTokensAndPca(**SQUARE)
    model.find_components(images_for(model, 40))
    path = tmp_path / "variant.pth"
    config = {"embed_dim": 32, "img_size": 32, **HEADS, "layer_norm_eps": 1e-6, "norm_pix_loss": False}
    torch.save({"model": model.state_dict(), "config": config}, path)
    imgs = images_for(model)
    assert torch.equal(features.load_encoder(path).encode(imgs), model.encode(imgs))
    with pytest.warns(UserWarning, match=r"is of a variant of MAE, with variant_mask_token, variant_pca_mean, .*, and so is"):
        plain = MAE.from_pretrained(path)
    assert torch.equal(plain.encode(imgs), model.encode(imgs))
    again = source.load_mae(source.Source(path))
    assert type(again) is MaskTokensAndPca
    assert_same_weights(again, model)
    report = checkpoint.convert(path, tmp_path / "plain.pth", "official")
    assert "variant_pca_basis" in report.ignored
    assert "of a variant" in report.warnings[0]
    with pytest.raises(checkpoint.CheckpointError, match="lacks variant_mask_token"):
        checkpoint.load(again, tmp_path / "plain.pth")
