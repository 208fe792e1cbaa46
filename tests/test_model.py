"""MAE: constructor, positions, factories, patches, pictures, masks, uint8 images."""

import copy
import inspect
import itertools

import numpy as np
import pytest
import support
import torch
from support import BATCHES, IMAGES, Batch, assert_equal, assert_results, images_for, noise_for, small_mae, small_reference, step
from torch import Tensor, nn

import maefast
from maefast import MAE, models_mae
from maefast.testing.errors import assert_close_to_float64

BF16, U8 = torch.bfloat16, torch.uint8


def test_constructor_is_the_official_one():
    official = {
        "img_size": 224, "patch_size": 16, "in_chans": 3, "embed_dim": 1024, "depth": 24, "num_heads": 16,
        "decoder_embed_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16,
        "mlp_ratio": 4.0, "norm_layer": nn.LayerNorm, "norm_pix_loss": False,
    }  # fmt: skip
    parameters = list(inspect.signature(MAE.__init__).parameters.values())[1:]
    positional, others = parameters[: len(official)], parameters[len(official) :]
    assert [(p.name, p.default) for p in positional] == list(official.items())
    assert {p.kind for p in positional} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert {p.kind for p in others} == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("name", support.SIZES)
def test_factories(name):
    D, depth, heads, p = support.SIZES[name]
    L, P, d = (224 // p) ** 2, 3 * p * p, 512
    of_a_block = [2 * 2 * n + (3 * n * n + 3 * n) + (n * n + n) + (4 * n * n + 4 * n) + (4 * n * n + n) for n in (D, d)]
    encoder = P * D + D + D + (1 + L) * D + depth * of_a_block[0] + 2 * D
    decoder = D * d + d + d + (1 + L) * d + 8 * of_a_block[1] + 2 * d + d * P + P
    with torch.device("meta"):
        model = getattr(maefast, f"mae_vit_{name}_patch{p}")(norm_pix_loss=True)
    assert sum(t.numel() for t in model.parameters()) == encoder + decoder
    assert name != "base" or round((encoder + decoder) / 1e6, 1) == 111.9
    assert [model.blocks[0].attn.num_heads, model.decoder_blocks[0].attn.num_heads] == [heads, 16]
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert model.norm_pix_loss
    assert getattr(maefast, f"mae_vit_{name}_patch{p}_dec512d8b") is getattr(maefast, f"mae_vit_{name}_patch{p}")


def test_factory_options_win():
    model = maefast.mae_vit_tiny_patch16(img_size=(32, 64), in_chans=2, depth=1, decoder_depth=1, decoder_embed_dim=32)
    assert model.patch_embed.grid_size == (2, 4)
    assert model.decoder_pred.weight.shape == (2 * 16 * 16, 32)
    assert len(model.blocks) == 1


def test_default_eps_is_that_of_layer_norm():
    with torch.device("meta"):
        model = MAE(32, 16, 3, 16, 1, 2, 16, 1, 2)
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}


def test_official_module_names():
    names = {f"mae_vit_{name}_patch{p}{tail}" for name, (*_, p) in support.SIZES.items() for tail in ("", "_dec512d8b")}
    assert set(models_mae.__all__) == names | {"MaskedAutoencoderViT"}
    assert models_mae.MaskedAutoencoderViT is MAE
    assert all(models_mae.__dict__[name] is getattr(maefast, name) for name in names)
    model = small_mae()
    assert (model.patch_embed.num_patches, model.patch_embed.patch_size[0]) == (24, 8)


@pytest.mark.parametrize(("name", "dim"), [("pos_embed", 32), ("decoder_pos_embed", 24)])
def test_positions(name, dim):
    """[w | h], each [sin | cos] of the coordinate / 10000^(k / (dim/4)); class token zero."""
    rows, cols = 8, 3  # of 64 x 48 in patches of 8 x 16
    table = np.zeros((1 + rows * cols, dim))
    for r, c, k in itertools.product(range(rows), range(cols), range(dim // 4)):
        omega, row = 10000 ** (-k / (dim / 4)), table[1 + r * cols + c]
        row[k], row[dim // 4 + k] = np.sin(c * omega), np.cos(c * omega)
        row[dim // 2 + k], row[3 * dim // 4 + k] = np.sin(r * omega), np.cos(r * omega)
    parameter = small_mae().get_parameter(name)
    torch.testing.assert_close(parameter[0].double(), torch.from_numpy(table), rtol=1e-7, atol=1e-8)
    assert not parameter.requires_grad
    assert name in small_mae().state_dict()


def test_initialisation():
    """As the paper: Xavier weights, biases 0 but the patch embedding's, tokens N(0, 0.02)."""
    model = small_mae(embed_dim=256, num_heads=4)
    bound = (6 / (256 + 3 * 256)) ** 0.5
    qkv = model.blocks[0].attn.qkv
    assert 0.99 * bound < qkv.weight.abs().max() <= bound
    assert qkv.bias.abs().max() == 0
    proj = model.patch_embed.proj  # (256, 3, 8, 16), xavier as a Linear from 384 to 256
    bound = (6 / (256 + 384)) ** 0.5
    assert 0.99 * bound < proj.weight.abs().max() <= bound
    assert proj.bias.abs().max() > 0
    assert 0.015 < model.cls_token.std() < 0.025


def test_patchify_by_loops():
    model = small_mae(in_chans=2, img_size=(6, 12), patch_size=(2, 3))
    imgs = images_for(model)
    patches = model.patchify(imgs)
    for i, y, x, channel in itertools.product(range(12), range(2), range(3), range(2)):
        r, c = divmod(i, 4)
        assert torch.equal(patches[:, i, (y * 3 + x) * 2 + channel], imgs[:, channel, 2 * r + y, 3 * c + x])
    assert torch.equal(model.unpatchify(patches), imgs)
    assert torch.equal(model.patchify(model.unpatchify(patches)), patches)


def test_forward_returns_the_official_triple():
    model = small_mae()
    output = model(images_for(model))
    loss, pred, mask = output
    assert output._fields == ("loss", "pred", "mask")
    assert loss is output.loss
    assert (loss.shape, pred.shape, mask.shape) == ((), (2, 24, 384), (2, 24))
    assert loss.dtype == mask.dtype == torch.float32
    assert mask.sum(dim=1).tolist() == [18, 18]


def test_without_pred_only_removed_patches_are_predicted():
    model = small_mae()
    seen = []
    model.decoder_pred.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    assert model(images_for(model), return_pred=False).pred is None
    assert seen == [(2, 18, 24)]


def test_own_noise():
    model = small_mae()
    imgs, noise = images_for(model), noise_for(model)
    ranks = noise.argsort(dim=1).argsort(dim=1)
    generator = torch.get_rng_state()
    for ratio, len_keep in ((0.75, 6), (0.5, 12), (1 / 24, 23)):
        assert torch.equal(model(imgs, ratio, noise=noise).mask, (ranks >= len_keep).float())
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, BF16, torch.float64], ids=str)
@pytest.mark.parametrize("return_pred", [True, False])
def test_own_mask(dtype, return_pred):
    """Honoured whatever mask_ratio says; the loss is the reference's with the mask as noise."""
    model = small_mae()
    reference, imgs = small_reference(), images_for(model)
    removed = noise_for(model).argsort(dim=1) >= 9
    mask = removed.to(dtype)
    generator = torch.get_rng_state()
    got = model(imgs, 5.0, mask=mask, return_pred=return_pred)
    assert torch.equal(got.mask, removed.float())
    assert torch.equal(mask, removed.to(dtype))
    assert torch.equal(torch.get_rng_state(), generator)
    given = {"mask_ratio": 15 / 24, "noise": removed.float()}
    torch.testing.assert_close(got.loss, reference(imgs, **given).loss, rtol=1e-6, atol=0)
    assert torch.equal(got.loss, model(imgs, **given, return_pred=return_pred).loss)


def test_smallest_and_largest_masks():
    model = small_mae()
    imgs = images_for(model, N=1)
    for ratio, removed in ((0.95, 23), (0.04, 1)):
        loss, _, mask = model(imgs, ratio)
        assert mask.sum() == removed
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("layout", support.IMAGE_LAYOUTS.values(), ids=support.IMAGE_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, U8], ids=["fp32", "uint8"])
def test_layout_of_images_does_not_matter(layout, dtype):
    model = small_mae()
    imgs, noise = images_for(model, dtype=dtype), noise_for(model)
    assert_equal(step(small_mae(), layout(imgs), noise), step(model, imgs, noise))


def test_constant_images_have_finite_gradients():
    model = small_mae()
    results = step(model, torch.full_like(images_for(model), 0.3), noise_for(model))
    assert all(value.isfinite().all() for value in results.values())


def test_two_runs_agree_bit_for_bit():
    runs = []
    for _ in range(2):
        model = small_mae()
        torch.manual_seed(3)
        loss = model(images_for(model)).loss
        loss.backward()
        runs.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert_equal(*runs)


def test_a_copy_is_the_same_model():
    model = small_mae()
    imgs, noise = images_for(model), noise_for(model)
    assert torch.equal(copy.deepcopy(model)(imgs, noise=noise).pred, model(imgs, noise=noise).pred)


def predict_target(model: MAE, imgs: Tensor) -> None:
    """From now on the decoder's output is the target itself."""
    target = model.patchify(support.widened(imgs, *((model.mean, model.std) if imgs.dtype == U8 else ())))
    if model.norm_pix_loss:
        target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    model.forward_decoder = lambda x, ids_restore: target.float()


@pytest.mark.parametrize("norm_pix_loss", [True, False], ids=["norm_pix", "pixels"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, U8], ids=["fp32", "bf16", "uint8"])
def test_a_perfect_prediction_reconstructs_the_image(dtype, norm_pix_loss):
    model = small_mae(norm_pix_loss=norm_pix_loss)
    imgs = images_for(model, dtype=dtype)
    predict_target(model, imgs)
    pictures = (model.bfloat16() if dtype == BF16 else model).reconstruct(imgs)
    assert pictures.dtype == torch.float32
    torch.testing.assert_close(pictures, imgs.float(), rtol=1e-5, atol=1e-3 if dtype == U8 else 1e-5)
    assert not pictures.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, U8], ids=["fp32", "uint8"])
def test_visible_patches_are_pasted(dtype):
    model = small_mae()
    imgs = images_for(model, dtype=dtype)
    mask = noise_for(model).argsort(dim=1) >= 9
    pictures, original = model.patchify(model.reconstruct(imgs, mask=mask)), model.patchify(imgs.float())
    assert torch.equal(pictures[~mask], original[~mask])
    assert (pictures[mask] != original[mask]).float().mean() > 0.9
    noise = noise_for(model, seed=7)
    assert torch.equal(model.reconstruct(imgs, 15 / 24, noise=mask.float()), model.reconstruct(imgs, mask=mask))
    kept = noise.argsort(dim=1).argsort(dim=1) < 3
    assert torch.equal(model.patchify(model.reconstruct(imgs, 21 / 24, noise=noise))[kept], original[kept])


def test_reconstruction_is_denormalised_per_patch():
    """A prediction of zeros is a removed patch's mean; ones lie one deviation above it."""
    model = small_mae()
    imgs, mask = images_for(model), noise_for(model).argsort(dim=1) >= 9
    target = model.patchify(imgs)
    mean, deviation = target.mean(dim=-1, keepdim=True), (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    for value in (0.0, 1.0):
        model.forward_decoder = lambda x, ids_restore, value=value: torch.full_like(target, value)
        got = model.patchify(model.reconstruct(imgs, mask=mask))[mask]
        torch.testing.assert_close(got, (mean + value * deviation).expand_as(target)[mask], rtol=1e-5, atol=1e-6)


def test_pictures_of_bytes_stay_in_range():
    model = small_mae(norm_pix_loss=False)
    imgs = images_for(model, dtype=U8)
    target = model.patchify(imgs)
    for value, edge in ((9.0, 255.0), (-9.0, 0.0)):
        model.forward_decoder = lambda x, ids_restore, value=value: torch.full(target.shape, value)
        mask = noise_for(model).argsort(dim=1) >= 9
        assert (model.patchify(model.reconstruct(imgs, mask=mask))[mask] == edge).all()


def normalised(model: MAE, imgs: Tensor) -> Tensor:
    return (imgs.float() / 255 - model.mean[:, None, None]) / model.std[:, None, None]


@pytest.mark.parametrize("statistics", [{}, {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}], ids=["imagenet", "own"])
@pytest.mark.parametrize("return_pred", [True, False], ids=["pred", "no_pred"])
def test_uint8_images_are_normalised_ones(statistics, return_pred):
    model, exact_model = small_mae(**statistics), small_mae(**statistics).double()
    reference = small_reference()
    other = support.attends_otherwise(reference)

    def run(seed: int) -> Batch:
        imgs, noise = images_for(model, IMAGES, U8, seed), noise_for(model, IMAGES, seed)
        plain = normalised(model, imgs)
        eager = [step(m, plain, noise) for m in (reference, other)]
        exact = step(exact_model, support.widened(imgs, model.mean, model.std), noise)
        return step(model, imgs, noise, return_pred=return_pred), eager, exact

    assert_results(map(run, range(BATCHES)), left_out=set() if return_pred else {"pred"})


def test_uint8_encode_is_that_of_normalised_images():
    model, exact_model, reference = small_mae(), small_mae().double(), small_reference()
    imgs = images_for(model, N=4, dtype=U8)
    eager = reference.forward_encoder(normalised(model, imgs), 0.0, torch.linspace(0, 1, 24).expand(4, -1))[0]
    assert_close_to_float64("encode", model.encode(imgs), eager, exact_model.encode(support.widened(imgs, model.mean, model.std)))


def test_pixel_statistics():
    model = small_mae()
    assert model.mean.tolist() == torch.tensor([0.485, 0.456, 0.406]).tolist()
    assert model.std.tolist() == torch.tensor([0.229, 0.224, 0.225]).tolist()
    assert not {"mean", "std"} & model.state_dict().keys()
    assert dict(model.named_buffers()).keys() == {"mean", "std"}
    other = small_mae(in_chans=1)
    assert other.mean is other.std is None
    own = small_mae(in_chans=2, mean=[0.5, 0.25], std=[1.0, 2.0])
    assert (own.mean.tolist(), own.std.tolist()) == ([0.5, 0.25], [1.0, 2.0])


@pytest.mark.parametrize("convert", [nn.Module.bfloat16, nn.Module.half, nn.Module.double, lambda m: m.to(BF16)])
def test_pixel_statistics_stay_fp32(convert):
    model = convert(small_mae())
    assert model.patch_embed.proj.weight.dtype != torch.float32
    assert model.mean.dtype == model.std.dtype == torch.float32
    assert model.mean.tolist() == torch.tensor([0.485, 0.456, 0.406]).tolist()
    assert dict(model.named_buffers())["mean"] is model.mean


def test_pixel_statistics_move_with_the_model():
    model = small_mae().to("meta", torch.bfloat16)
    assert (model.mean.device.type, model.mean.dtype) == ("meta", torch.float32)


def test_bf16_model_on_uint8_images():
    """Bytes are normalised in fp32 and rounded once: as close to exact pixels as bf16 allows."""
    model = small_mae().bfloat16()
    imgs, noise = images_for(model, dtype=U8), noise_for(model)
    pixels = support.widened(imgs, model.mean, model.std)
    loss, pred, _ = model(imgs, noise=noise)
    assert (loss.dtype, pred.dtype) == (torch.float32, BF16)
    exact = copy.deepcopy(model).double()(pixels, noise=noise)
    eager = small_reference().bfloat16()(pixels.to(BF16), noise=noise)
    assert_close_to_float64("pred", pred, eager.pred, exact.pred)
