"""Training from weights: other images, channels or decoders, classifiers; the meta device."""

import copy
from pathlib import Path

import pytest
import torch
from checkpoints import HEADS, SQUARE, assert_positions_of_8_x_5, assert_same_weights, copy_of, decoder_of, encoder_of, trained
from support import images_for, noise_for
from torch import nn

from maefast import MAE, VisionTransformer, checkpoint
from maefast.checkpoint import CheckpointError
from maefast.train.variants import MaskTokensInEncoder

ENCODER = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}


@pytest.fixture(scope="module")
def model() -> MAE:
    return trained(norm_pix_loss=True)


@pytest.fixture
def official(model, tmp_path) -> Path:
    torch.save({"model": model.state_dict(), "args": {"norm_pix_loss": True}, "epoch": 3}, tmp_path / "official.pth")
    return tmp_path / "official.pth"


def test_the_same_model(model, official):
    target = trained(seed=1, norm_pix_loss=True)
    report = target.init_from(official)
    assert_same_weights(target, model)
    assert report.warnings == report.positions == report.adapted == report.missing == report.unexpected == ()
    assert (report.source, report.ignored) == ("model", ("epoch",))


def test_images_of_another_size(model, official):
    target = trained(seed=1, img_size=(64, 40), norm_pix_loss=True)
    assert_positions_of_8_x_5(target, target.init_from(official))
    rest = {name: tensor for name, tensor in model.state_dict().items() if "pos_embed" not in name}
    assert_same_weights({name: tensor for name, tensor in target.state_dict().items() if name in rest}, rest)


@pytest.mark.parametrize("channels", [1, 2, 4, 6, 7])
def test_images_of_another_number_of_channels(model, official, channels):
    """A grey image keeps its tokens; a channel's prediction is that of one channel, or the mean."""
    target = trained(seed=1, in_chans=channels, norm_pix_loss=True)
    report = target.init_from(official)
    grey = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    models = ((copy.deepcopy(model), 3), (target, channels))
    expected, got = (m.double().encode(grey.expand(-1, C, -1, -1)) for m, C in models)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)

    theirs = model.decoder_pred.weight.double().view(64, 3, 24)  # [ph*pw, C, D]
    ours = target.decoder_pred.weight.view(64, channels, 24)
    for channel in range(channels):
        predicted = theirs[:, channel % 3] if channels > 3 else theirs.mean(dim=1)
        torch.testing.assert_close(ours[:, channel], predicted, rtol=0, atol=1e-6)
    said = "repeated for" if channels > 3 else "averaged over the 3 channels of the file for"
    names = [change.split()[0] for change in report.adapted]
    assert names == ["patch_embed.proj.weight", "decoder_pred.weight", "decoder_pred.bias"]
    assert report.adapted[0].startswith(f"patch_embed.proj.weight {said} {channels}")
    assert f"adapted: {report.adapted[0]}" in str(report).splitlines()
    assert report.warnings == ()


def test_from_one_channel(tmp_path):
    grey = trained(in_chans=1)
    torch.save(grey.state_dict(), tmp_path / "grey.pth")
    target = trained(seed=1)
    target.init_from(tmp_path / "grey.pth")
    expected = (grey.patch_embed.proj.weight / 3).expand(-1, 3, -1, -1)
    torch.testing.assert_close(target.patch_embed.proj.weight, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"decoder_embed_dim": 48}, r"mask_token is \(1, 1, 24\) in the checkpoint and \(1, 1, 48\) in the model"),
        ({"decoder_depth": 2}, "it lacks decoder_blocks.1.norm1.weight"),
        ({"decoder_depth": 0}, "it has decoder_blocks.0.norm1.weight"),
    ],
)
def test_another_decoder(model, official, options, why):
    target = trained(seed=1, norm_pix_loss=True, **options)
    before = copy_of(decoder_of(target))
    report = target.init_from(official)
    assert_same_weights(decoder_of(target), before)
    assert_same_weights(encoder_of(target), encoder_of(model))
    (warning,) = report.warnings
    assert warning.startswith("the decoder of the checkpoint is left out, and the model keeps its own: ")
    assert why.replace("\\", "") in warning
    assert set(report.unexpected) == decoder_of(model).keys()
    assert not report.has_decoder


def test_a_decoder_with_other_heads(model, tmp_path):
    """The shapes fit, and the decoder would compute something else."""
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    model.save_pretrained(tmp_path / "own")
    target = trained(seed=1, decoder_num_heads=4, norm_pix_loss=True)
    before = copy_of(decoder_of(target))
    (warning,) = target.init_from(tmp_path / "own").warnings
    assert warning.endswith(f"decoder_num_heads is 3 in {tmp_path / 'own'} and 4 in MAE")
    assert_same_weights(decoder_of(target), before)
    with pytest.raises(CheckpointError, match=r"num_heads is 4 in .* and 8 in MAE"):
        trained(num_heads=8).init_from(tmp_path / "own")


def test_an_encoder_alone(model, tmp_path):
    torch.save({"model": encoder_of(model)}, tmp_path / "encoder.pth")
    target = trained(seed=1)
    before = copy_of(decoder_of(target))
    report = target.init_from(tmp_path / "encoder.pth")
    assert_same_weights(target, {name: (encoder_of(model) | before)[name] for name in target.state_dict()})
    assert report.warnings == ("the checkpoint holds no decoder; the model keeps its own",)


@pytest.mark.parametrize("global_pool", [False, True])
def test_a_classifier(tmp_path, global_pool):
    torch.manual_seed(3)
    classifier = VisionTransformer(**ENCODER, num_classes=5, global_pool=global_pool)
    torch.save({"model": classifier.state_dict()}, tmp_path / "tuned.pth")
    target = trained(seed=1)
    before = copy_of(target)
    report = target.init_from(tmp_path / "tuned.pth")
    shared = {name: t for name, t in classifier.state_dict().items() if not name.startswith(("head.", "fc_norm."))}
    assert_same_weights(target, before | shared)
    assert ("norm.weight" in report.missing) == global_pool
    assert report.warnings[0] == "the head of the checkpoint, head.weight (5, 32), is left out: training starts without it"
    assert any("fc_norm, for pooled tokens" in warning for warning in report.warnings) == global_pool


def test_a_variant_keeps_what_it_has_beyond_an_mae(model, official):
    torch.manual_seed(1)
    target = MaskTokensInEncoder(**SQUARE, norm_pix_loss=True)
    own = target.variant_mask_token.clone()
    assert target.init_from(official).missing == ("variant_mask_token",)
    assert torch.equal(target.variant_mask_token, own)
    assert_same_weights({n: t for n, t in target.state_dict().items() if n != "variant_mask_token"}, model.state_dict())


def test_another_target_warns(official):
    (warning,) = trained(seed=1, norm_pix_loss=False).init_from(official).warnings
    assert warning == "norm_pix_loss is False, and the checkpoint was trained with norm_pix_loss=True"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 64}, r"cls_token is \(1, 1, 32\) in the checkpoint and \(1, 1, 64\) in the model"),
        ({"depth": 3}, "it lacks blocks.2.norm1.weight"),
        ({"depth": 1}, "it has blocks.1.norm1.weight"),
        ({"patch_size": 4}, r"patch_embed.proj.weight is \(32, 3, 8, 8\) in the checkpoint and \(32, 3, 4, 4\)"),
    ],
)
def test_another_encoder_is_refused(official, options, message):
    target = trained(seed=1, **options)
    before = copy_of(target)
    with pytest.raises(CheckpointError, match=message):
        target.init_from(official)
    assert_same_weights(target, before)


def test_an_encoder_is_no_mae(official):
    with pytest.raises(TypeError, match="model must be an MAE, with a decoder; it is a VisionTransformer, which load fills"):
        checkpoint.init_from(VisionTransformer(**ENCODER), official)


def on_meta(make: type[nn.Module], **options: object) -> nn.Module:
    with torch.device("meta"):
        return make(**options)


def assert_same_loss(model: MAE, expected: MAE) -> None:
    imgs, noise = images_for(model, dtype=torch.uint8), noise_for(model)
    assert torch.equal(model(imgs, noise=noise).loss, expected(imgs, noise=noise).loss)


@pytest.mark.parametrize("mean_std", [{}, {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}], ids=["imagenet", "own"])
def test_pixel_statistics_survive_the_meta_device(mean_std):
    """They are not in the state_dict that fills the model."""
    expected = trained(**mean_std)
    emptied = on_meta(MAE, **SQUARE, **mean_std).to_empty(device="cpu")
    emptied.load_state_dict(expected.state_dict())
    assigned = on_meta(MAE, **SQUARE, **mean_std)
    assigned.load_state_dict(expected.state_dict(), assign=True)
    moved = trained(**mean_std).to("meta").to_empty(device="cpu")
    moved.load_state_dict(expected.state_dict())
    for model in (emptied, assigned, moved):
        assert_same_loss(model, expected)


def test_to_empty_of_a_real_model_keeps_pixel_statistics():
    expected, model = trained(), trained()
    model.mean.fill_(0.25)
    expected.mean.fill_(0.25)
    model = model.to_empty(device="cpu")
    assert torch.equal(model.mean, expected.mean)
    assert torch.equal(model.std, expected.std)


def test_statistics_of_an_encoder_survive_the_meta_device():
    torch.manual_seed(0)
    expected = VisionTransformer(**ENCODER, num_classes=0)
    model = on_meta(VisionTransformer, **ENCODER, num_classes=0).to_empty(device="cpu")
    model.load_state_dict(expected.state_dict())
    imgs = images_for(expected, dtype=torch.uint8)
    assert torch.equal(model(imgs), expected(imgs))


def test_load_fills_a_model_on_the_meta_device(official, model):
    target = on_meta(MAE, **SQUARE, norm_pix_loss=True)
    assert checkpoint.load(target, official).warnings == ()
    assert_same_weights(target, model)
    assert not target.pos_embed.requires_grad
    assert target.cls_token.requires_grad
    assert_same_loss(target, model)
    with torch.device("meta"):
        loaded = MAE.from_pretrained(official, **HEADS)
    assert_same_weights(loaded, model)


def test_a_model_on_the_meta_device_needs_every_tensor(model, tmp_path):
    torch.save({"model": encoder_of(model)}, tmp_path / "encoder.pth")
    target = on_meta(MAE, **SQUARE)
    with pytest.raises(CheckpointError, match=r"lacks mask_token, .*, which MAE has on the meta device, without values$"):
        checkpoint.load(target, tmp_path / "encoder.pth")
    assert target.cls_token.is_meta
