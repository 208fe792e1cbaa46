"""MAE against ReferenceMAE at one seed: the same masks, all else within the error rule."""

import copy
from functools import partial

import pytest
import support
import torch
from loss_curves import train
from support import BATCHES, IMAGES, assert_equal, assert_results, images_for, noise_for, small_mae, small_reference, step
from torch import Tensor, nn

import maefast
from maefast import MAE
from maefast.ops import _tokens
from maefast.reference import ReferenceMAE
from maefast.testing.errors import assert_close_to_float64

F32, BF16 = torch.float32, torch.bfloat16
MODES = ("fp32", "bf16", "autocast")
HALVES = {"bf16": BF16, "fp16": torch.float16}
MODELS = {
    "non_square": {},
    "pixels": {"norm_pix_loss": False},
    "one_channel": {"in_chans": 1, "img_size": 28, "patch_size": 4},
    "four_channels": {"in_chans": 4, "img_size": 32, "patch_size": (16, 4)},
    "thirteen_channels": {"in_chans": 13, "img_size": (20, 30), "patch_size": 10},
}


def load(model: nn.Module, reference: ReferenceMAE) -> nn.Module:
    model.load_state_dict(reference.state_dict())
    return model


def both(reference: ReferenceMAE) -> list[nn.Module]:
    return [reference, support.attends_otherwise(reference)]


def compare(model, references, mode: str, batches: int = BATCHES, exact: support.Results | None = None, **options) -> None:
    """Hold several batches to the error rule; `exact` is the truth of a single batch of 2."""
    if mode in HALVES:
        model, references = model.to(HALVES[mode]), [reference.to(HALVES[mode]) for reference in references]
    exact_model = copy.deepcopy(references[0]).double()

    def run(seed: int) -> support.Batch:
        N = 2 if batches == 1 else IMAGES
        imgs, noise = images_for(model, N, HALVES.get(mode, F32), seed=10 + seed), noise_for(model, N, seed=seed)
        got = step(model, imgs, noise, mode, **options)
        assert got["loss"].dtype == F32
        eager = [step(reference, imgs, noise, mode) for reference in references]
        return got, eager, exact or step(exact_model, imgs.double(), noise)

    assert_results(map(run, range(batches)), what=f"{mode}, ", left_out={"pred"} if options else set())


@pytest.mark.parametrize("mode", [*MODES, "fp16"])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_small_models(options, mode):
    reference = small_reference(**options)
    compare(load(small_mae(seed=9, **options), reference), both(reference), mode)


@pytest.mark.parametrize("repeated", [0, 1 << 60], ids=["repeated", "all"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [MODELS["non_square"], MODELS["one_channel"]], ids=["non_square", "one_channel"])
def test_without_pred(options, mode, repeated, monkeypatch):
    """With the first decoder block on distinct tokens once, as in large batches, and without."""
    monkeypatch.setattr(_tokens, "REPEATED_VALUES", repeated)
    options = {**options, "decoder_depth": 2}
    reference = small_reference(**options)
    compare(load(small_mae(seed=9, **options), reference), both(reference), mode, return_pred=False)


@pytest.mark.parametrize("mode", [*MODES, "fp16"])
@pytest.mark.parametrize("decoder_depth", [0, 1, 2, 3])
def test_without_pred_for_any_depth_of_the_decoder(decoder_depth, mode):
    """The last block computes only removed patches; without a block its input is indexed."""
    reference = small_reference(decoder_depth=decoder_depth)
    compare(load(small_mae(seed=9, decoder_depth=decoder_depth), reference), both(reference), mode, return_pred=False)


BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12, "norm_layer": partial(nn.LayerNorm, eps=1e-6), "norm_pix_loss": True}


@pytest.fixture(scope="module")
def base() -> tuple[nn.Module, ReferenceMAE, support.Results]:
    """ViT-B/16, its reference with the same weights, and the exact results of one batch."""
    torch.manual_seed(0)
    reference = ReferenceMAE(**BASE)
    model = load(maefast.mae_vit_base_patch16(norm_pix_loss=True), reference)
    exact = step(copy.deepcopy(reference).double(), images_for(model, seed=10).double(), noise_for(model, seed=0))
    return model, reference, exact


@pytest.mark.parametrize("mode", MODES)
def test_base_patch16_at_224(base, mode):
    model, reference, exact = base
    if mode == "bf16":  # other weights, so another truth
        compare(copy.deepcopy(model), [copy.deepcopy(reference)], mode, batches=1)
    else:
        compare(model, [reference], mode, batches=1, exact=exact)


def test_attention_of_the_paper():
    """The reference with materialised scores is the same model."""
    reference = small_reference(attention="math")
    compare(load(small_mae(seed=9), reference), both(reference), "fp32")


@pytest.mark.parametrize("return_pred", [True, False], ids=["pred", "no_pred"])
def test_the_caller_may_divide_the_loss_in_place(return_pred):
    model = small_mae()
    imgs, noise = images_for(model), noise_for(model)
    whole, half = (copy.deepcopy(step(model, imgs, noise, in_place=half, return_pred=return_pred)) for half in (False, True))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(half[name], whole[name] / 2), name


@pytest.mark.parametrize("ratio", [0.75, 0.5, 0.9, 0.05])
def test_masks_of_a_seed(ratio):
    reference, model = small_reference(), small_mae()
    imgs = images_for(model, N=5)
    for seed in range(3):
        torch.manual_seed(seed)
        expected, after = reference(imgs, ratio).mask, torch.rand(1)
        torch.manual_seed(seed)
        assert torch.equal(model(imgs, ratio).mask, expected)
        assert torch.equal(torch.rand(1), after)
        torch.manual_seed(seed)
        assert torch.equal(model(imgs, ratio, return_pred=False).mask, expected)
        torch.manual_seed(seed)
        assert torch.equal(model.forward_encoder(imgs, ratio)[1], expected)


def test_ratio_is_truncated_as_a_float():
    """int(100 * (1 - 0.9)) is 9."""
    model = small_mae(img_size=40, patch_size=4)
    assert (model(images_for(model), 0.9).mask == 0).sum(dim=1).tolist() == [9, 9]


@pytest.mark.parametrize("name", ["non_square", "pixels", "thirteen_channels"])
def test_same_seed_gives_the_same_weights(name):
    reference, model = small_reference(seed=4, **MODELS[name]), small_mae(seed=4, **MODELS[name])
    after_model = torch.rand(2)
    small_reference(seed=4, **MODELS[name])
    assert torch.equal(torch.rand(2), after_model)
    assert_equal(model.state_dict(), reference.state_dict())
    trained, expected = ([name for name, p in m.named_parameters() if p.requires_grad] for m in (model, reference))
    assert trained == expected


def test_state_dicts_are_exchanged_both_ways():
    reference, model = small_reference(seed=1), small_mae(seed=2)
    saved = copy.deepcopy(model.state_dict())
    load(model, reference)
    reference.load_state_dict(saved)
    assert_equal(reference.state_dict(), saved)
    imgs, noise = images_for(model), noise_for(model)
    assert torch.equal(small_reference(seed=1)(imgs, noise=noise).mask, model(imgs, noise=noise).mask)


def pair(mode: str) -> tuple[MAE, ReferenceMAE, Tensor]:
    """Return a model, its reference and images, all in bf16 by that mode."""
    reference = small_reference()
    model = load(small_mae(seed=9), reference)
    dtype = HALVES.get(mode, F32)
    return model.to(dtype), reference.to(dtype), images_for(model, IMAGES, dtype)


@pytest.mark.parametrize("mode", MODES)
def test_encode_is_the_encoder_with_nothing_masked(mode):
    """In the order of the image: the reference keeps everything, its noise shuffles nothing."""
    model, reference, imgs = pair(mode)
    in_order = torch.linspace(0, 1, 24).expand(IMAGES, -1)
    with torch.autocast("cpu", BF16, enabled=mode == "autocast"):
        got, eager = model.encode(imgs), [m.forward_encoder(imgs, 0.0, in_order)[0] for m in both(reference)]
    exact = copy.deepcopy(reference).double().forward_encoder(imgs.double(), 0.0, in_order)[0]
    assert got.dtype == eager[0].dtype
    assert_close_to_float64("encode", got, eager, exact)


@pytest.mark.parametrize("mode", MODES)
def test_official_methods(mode):
    """forward_encoder and forward_decoder, called as a script would."""
    model, reference, imgs = pair(mode)

    def run(m: nn.Module, imgs: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        with torch.autocast("cpu", BF16, enabled=mode == "autocast" and imgs.dtype == F32):
            latent, mask, ids_restore = m.forward_encoder(imgs, 0.5)
            return mask, ids_restore, latent, m.forward_decoder(latent, ids_restore)

    got, exact = run(model, imgs), run(copy.deepcopy(reference).double(), imgs.double())
    eager = [run(m, imgs) for m in both(reference)]
    assert_equal(got[:2], eager[0][:2])
    for i, name in enumerate(("latent", "pred"), 2):
        assert_close_to_float64(name, got[i], [results[i] for results in eager], exact[i])


def test_random_masking_of_tokens():
    reference, model = small_reference(), small_mae()
    x = torch.randn(3, 24, 32)
    torch.manual_seed(6)
    expected = reference.random_masking(x, 0.7)
    torch.manual_seed(6)
    assert_equal(model.random_masking(x, 0.7), expected)


def test_float64_model():
    reference = small_reference()
    model = load(small_mae(seed=9), reference).double()
    reference.double()
    imgs, noise = images_for(model).double(), noise_for(model)
    torch.testing.assert_close(step(model, imgs, noise), step(reference, imgs, noise), rtol=1e-9, atol=1e-11)


def waves(count: int) -> list[Tensor]:
    """Return batches of waves with a phase for each channel, which a hundred steps learn."""
    grid = torch.stack(torch.meshgrid(torch.linspace(0, 1, 32), torch.linspace(0, 1, 32), indexing="ij"))
    generator = torch.Generator().manual_seed(0)
    frequencies = 8 * torch.rand(count, 16, 1, 2, 1, 1, generator=generator)
    phases = 7 * torch.rand(count, 16, 3, 1, 1, generator=generator)
    return list(((frequencies * grid).sum(dim=3) + phases).sin())


CURVE = {"img_size": 32, "patch_size": 8, "norm_pix_loss": False, "decoder_depth": 2, "embed_dim": 64, "decoder_embed_dim": 48}


@pytest.fixture(scope="module")
def exact_curve() -> Tensor:
    """The losses of a hundred steps in float64."""
    losses = train(small_reference(**CURVE).double(), [imgs.double() for imgs in waves(100)], False)
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
def test_a_hundred_steps_of_training(exact_curve, autocast):
    """The loss strays from float64's no farther than the reference's own does."""
    assert exact_curve[-20:].mean() < 0.8 * exact_curve[:5].mean()
    mine, theirs = (torch.tensor(train(make(**CURVE), waves(100), autocast)) for make in (small_mae, small_reference))
    assert_close_to_float64("loss curve", mine, theirs, exact_curve)


def accumulated(model: nn.Module, dtype: torch.dtype = F32, **options: object) -> Tensor:
    """Return the losses of micro batches, two a step, each with another mask ratio."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    losses = []
    for i in range(24):
        imgs, noise = images_for(model, IMAGES, seed=i).to(dtype), noise_for(model, IMAGES, seed=i)
        loss = model(imgs, 0.9 - 0.1 * (i % 8), noise=noise, **options).loss
        losses.append(loss.item())
        loss /= 2  # in place, as scripts do
        loss.backward()
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
    return torch.tensor(losses, dtype=dtype)


@pytest.mark.parametrize("options", [{}, {"return_pred": False}], ids=["pred", "no_pred"])
def test_accumulated_gradients_and_a_mask_ratio_of_each_batch(options):
    reference = small_reference()
    model, exact = load(small_mae(seed=9), reference), copy.deepcopy(reference).double()
    eager, truth = [accumulated(m) for m in both(reference)], accumulated(exact, torch.float64)
    assert truth[0] - truth[-1] > 0.05  # it learns
    assert_close_to_float64("losses", accumulated(model, **options), eager, truth)
