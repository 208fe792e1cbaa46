"""Checkpoints: every layout read into models, round trips bit for bit, other libraries."""

import argparse
import json
import warnings
from functools import partial
from pathlib import Path

import checkpoints
import pytest
import torch
from checkpoints import HEADS, SQUARE, assert_loads, assert_same_weights, decoder_of, encoder_of, trained
from support import images_for, noise_for
from torch import Tensor, nn

import maefast
from maefast import MAE, checkpoint
from maefast.reference import ReferenceMAE

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")


@pytest.fixture(scope="module")
def model() -> MAE:
    return trained()


@pytest.fixture(scope="module")
def official(model: MAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training checkpoint as the official script leaves it."""
    path = tmp_path_factory.mktemp("official") / "checkpoint-799.pth"
    args = argparse.Namespace(model="mae_vit_custom", norm_pix_loss=True, mask_ratio=0.6, blr=1.5e-4, output_dir="out")
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}]}
    torch.save({"model": model.state_dict(), "optimizer": optimizer, "epoch": 799, "scaler": {}, "args": args}, path)
    return path


def test_official_training_checkpoint(model, official):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = MAE.from_pretrained(official, norm_pix_loss=True, **HEADS)
    assert_same_weights(loaded, model)
    assert loaded.norm.eps == loaded.decoder_blocks[0].norm2.eps == 1e-6
    assert (loaded.patch_embed.img_size, loaded.patch_embed.patch_size) == ((32, 32), (8, 8))
    assert MAE.from_pretrained(official, **HEADS).norm_pix_loss is True  # as args tell

    report = checkpoint.load(trained(seed=1, norm_pix_loss=True), official)
    assert report.ignored == ("optimizer", "epoch", "scaler")
    assert (report.missing, report.unexpected, report.positions, report.warnings) == ((), (), (), ())
    assert (report.layout, report.has_decoder, report.norm_pix_loss) == ("official", True, True)
    assert str(report).splitlines() == [
        f"{official}: official layout, with decoder",
        "taken from: model",
        "target: normalised pixels",
        "missing: nothing",
        "unexpected: nothing",
        "ignored: optimizer, epoch, scaler",
    ]


def test_heads_of_known_widths(tmp_path):
    model = MAE(img_size=32, embed_dim=192, depth=1, num_heads=3, decoder_depth=1)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    with pytest.warns(UserWarning, match="does not store whether its target was normalised pixels; norm_pix_loss is False"):
        loaded = MAE.from_pretrained(tmp_path / "bare.pt")
    assert (loaded.blocks[0].attn.num_heads, loaded.decoder_blocks[0].attn.num_heads) == (3, 16)
    assert_same_weights(loaded, model)


def test_official_model_names_tell_heads(tmp_path):
    """A model of the shapes of mae_vit_base_patch16 with six heads is refused: it has twelve."""
    model = MAE(img_size=32, embed_dim=768, depth=1, num_heads=6, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=4)
    args = argparse.Namespace(model="mae_vit_base_patch16", norm_pix_loss=False)
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "base.pth")
    with pytest.raises(checkpoint.CheckpointError, match=r"num_heads is 12 in .*base.pth and 6 in MAE"):
        checkpoint.load(model, tmp_path / "base.pth")


def test_encoder_alone(model, tmp_path):
    torch.save({"model": encoder_of(model)}, tmp_path / "encoder.pth")
    with pytest.warns(UserWarning, match="holds no decoder; the model keeps its own"):
        loaded = MAE.from_pretrained(tmp_path / "encoder.pth", num_heads=4, decoder_embed_dim=16, decoder_num_heads=2)
    assert_same_weights(encoder_of(loaded), encoder_of(model))
    assert loaded.decoder_blocks[0].attn.qkv.weight.shape == (48, 16)

    before = trained(seed=1).state_dict()
    report = assert_loads(tmp_path / "encoder.pth", {**before, **encoder_of(model)})
    assert set(report.missing) == decoder_of(before).keys()
    assert not report.has_decoder
    assert report.norm_pix_loss is None
    assert "without decoder" in str(report)
    assert "target: not stored in the file" in str(report)


def test_entry_config_is_the_constructors_arguments(tmp_path):
    """The layout of the demo's checkpoint."""
    config = {**SQUARE, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    del config["norm_layer"]
    model = MAE(**config)
    torch.save({"model": model.state_dict(), "config": config, "args": {"lr": 1e-3}}, tmp_path / "demo.pt")
    with pytest.warns(UserWarning, match="does not store whether"):
        loaded = MAE.from_pretrained(tmp_path / "demo.pt")
    assert loaded.norm.eps == 1e-5
    imgs, noise = images_for(model, dtype=torch.uint8), noise_for(model)
    assert torch.equal(model(imgs, noise=noise).loss, loaded(imgs, noise=noise).loss)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_wrapped_models(model, tmp_path, prefix):
    torch.save({"state_dict": {prefix + name: t for name, t in model.state_dict().items()}}, tmp_path / "wrapped.bin")
    assert_loads(tmp_path / "wrapped.bin", model)


def test_torch_save_of_before_version_1_6(model, tmp_path):
    torch.save({"model": model.state_dict()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_loads(tmp_path / "old.pth", model)


def test_reference_loads_too(model, official):
    target = ReferenceMAE(**SQUARE)
    checkpoint.load(target, official)
    assert_same_weights(target, model)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_sharded_folder(model, tmp_path, suffix):
    tensors = model.state_dict()
    names = list(tensors)
    shards = {f"model-0000{i + 1}-of-00003.{suffix}": names[i::3] for i in range(3)}
    for file, held in shards.items():
        save = safetensors.save_file if suffix == "safetensors" else torch.save
        save({name: tensors[name] for name in held}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (tmp_path / f"model.{suffix}.index.json").write_text(json.dumps(index))
    assert_loads(tmp_path, model)


def test_folder_of_a_trainer(model, tmp_path):
    """Its other .bin files are no weights."""
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "training_args.bin").write_bytes(b"")
    assert_loads(tmp_path, model)


class Encoder(nn.Module):
    """The encoder for fine-tuning, as far as its names go."""

    def __init__(self, global_pool: bool):
        super().__init__()
        mae = trained(seed=5)
        self.patch_embed, self.blocks, self.head = mae.patch_embed, mae.blocks, nn.Linear(32, 10)
        self.cls_token, self.pos_embed = mae.cls_token, nn.Parameter(mae.pos_embed.data)
        setattr(self, "fc_norm" if global_pool else "norm", nn.LayerNorm(32))


@pytest.mark.parametrize("global_pool", [True, False])
def test_encoder_for_fine_tuning(model, official, global_pool):
    encoder = Encoder(global_pool)
    report = checkpoint.load(encoder, official)
    assert set(report.missing) == {"head.weight", "head.bias"} | ({"fc_norm.weight", "fc_norm.bias"} if global_pool else set())
    assert set(report.unexpected) == decoder_of(model).keys() | ({"norm.weight", "norm.bias"} if global_pool else set())
    assert report.warnings == ()
    loaded = encoder.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in encoder_of(model).items() if name in loaded)


def test_a_fine_tuned_encoder_again(tmp_path):
    """Trained positions, not square, a head: the same model takes them all as they are."""
    encoder = Encoder(global_pool=True)
    encoder.patch_embed.grid_size = (8, 2)
    with torch.no_grad():
        encoder.pos_embed.normal_()
    torch.save(encoder.state_dict(), tmp_path / "tuned.pth")
    report = checkpoint.load(encoder, tmp_path / "tuned.pth")
    assert (report.missing, report.unexpected, report.positions) == ((), (), ())
    assert_same_weights(encoder, torch.load(tmp_path / "tuned.pth"))


def test_target_of_another_kind_warns(official):
    report = checkpoint.load(trained(norm_pix_loss=False), official)
    assert report.warnings == ("norm_pix_loss is False, and the checkpoint was trained with norm_pix_loss=True",)
    assert str(report).endswith(f"warning: {report.warnings[0]}")


def test_fixed_positions_are_computed_for_another_grid(official):
    loaded, target = MAE.from_pretrained(official, img_size=(64, 40), **HEADS), trained(img_size=(64, 40), norm_pix_loss=True)
    report = checkpoint.load(target, official)
    for model in (loaded, target):
        checkpoints.assert_positions_of_8_x_5(model, report)


@pytest.mark.parametrize("img_size", [(64, 16), (16, 64), (24, 40)])
def test_fixed_positions_tell_their_grid(tmp_path, img_size):
    """8 x 2 and 2 x 8 patches are as many as 4 x 4, and 15 is no square."""
    torch.save({"model": trained(img_size=img_size).state_dict()}, tmp_path / "wide.pth")
    with pytest.warns(UserWarning, match="target"):
        assert MAE.from_pretrained(tmp_path / "wide.pth", **HEADS).patch_embed.img_size == img_size


def with_trained_positions(img_size: tuple[int, int], path: Path) -> Tensor:
    """Write a checkpoint whose positions hold row and column as their first values; return them."""
    model = trained(img_size=img_size)
    rows, columns = model.patch_embed.grid_size
    with torch.no_grad():
        model.pos_embed.normal_()
        model.pos_embed[0, 1:, 0] = torch.arange(rows).repeat_interleave(columns)
        model.pos_embed[0, 1:, 1] = torch.arange(columns).repeat(rows)
    torch.save({"model": model.state_dict()}, path)
    return model.pos_embed.detach()


def test_trained_positions_are_resized(tmp_path):
    stored = with_trained_positions((32, 32), tmp_path / "tuned.pth")
    target = trained(img_size=(64, 48))
    report = checkpoint.load(target, tmp_path / "tuned.pth")
    assert "pos_embed resized (bicubic) for 8 x 6 patches; the file has 4 x 4" in report.positions
    resized = target.pos_embed[0, 1:].view(8, 6, 32)
    assert torch.equal(target.pos_embed[:, 0], stored[:, 0])
    assert (resized[:, :, 0] - resized[:, :1, 0]).abs().max() < 1e-5  # rows stay rows
    assert (resized[:, :, 1] - resized[:1, :, 1]).abs().max() < 1e-5
    for value in (0, 1, 7):
        image = stored[0, 1:, value].view(1, 1, 4, 4)
        expected = nn.functional.interpolate(image, (8, 6), mode="bicubic", align_corners=False)[0, 0]
        torch.testing.assert_close(resized[:, :, value], expected, rtol=0, atol=1e-5)


def test_stored_grid_of_trained_positions(tmp_path):
    stored = with_trained_positions((24, 40), tmp_path / "tuned.pth")
    with pytest.raises(checkpoint.CheckpointError, match=r"stored_grid must be given .* positions of 15 patches, no square"):
        MAE.from_pretrained(tmp_path / "tuned.pth", **HEADS)
    with pytest.raises(checkpoint.CheckpointError, match="positions of 15 patches, and not of 4 x 4"):
        MAE.from_pretrained(tmp_path / "tuned.pth", stored_grid=(4, 4), **HEADS)
    with pytest.warns(UserWarning, match="target"):
        loaded = MAE.from_pretrained(tmp_path / "tuned.pth", stored_grid=(3, 5), **HEADS)
    assert loaded.patch_embed.img_size == (24, 40)
    assert torch.equal(loaded.pos_embed, stored)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"img_size": (64, 48), "patch_size": (8, 16), "norm_pix_loss": True},
        {"in_chans": 2, "mean": (0.1, 0.2), "std": (0.3, 0.4), "mlp_ratio": 2.7},
        {"in_chans": 1, "decoder_depth": 0, "norm_layer": nn.LayerNorm},
        {"mlp_ratio": 2.7, "decoder_embed_dim": 96},  # 86 / 32 is not 2.7, and would give 258 where 259 is meant
        {"depth": 0, "mlp_ratio": 2.0},
    ],
)
def test_save_pretrained(tmp_path, options):
    model = trained(**options)
    model.save_pretrained(tmp_path / "far" / "below")
    loaded = MAE.from_pretrained(tmp_path / "far" / "below")
    assert_same_weights(loaded, model)
    dtype = torch.float32 if model.mean is None else torch.uint8
    imgs, noise = images_for(model, dtype=dtype), noise_for(model)
    for ours, theirs in zip(model(imgs, noise=noise), loaded(imgs, noise=noise), strict=True):
        assert torch.equal(ours, theirs)
    assert loaded.decoder_norm.eps == model.decoder_norm.eps
    assert sorted(file.name for file in (tmp_path / "far" / "below").iterdir()) == ["config.json", "model.safetensors"]


def test_save_pretrained_of_another_norm(tmp_path):
    model = trained(norm_layer=lambda dim: nn.GroupNorm(1, dim))
    with pytest.raises(ValueError, match=r"norm_layer must be nn.LayerNorm to be saved; it is GroupNorm"):
        model.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_by_way_of_transformers(tmp_path, dtype):
    tensors = trained(mlp_ratio=2.7).to(dtype).state_dict()
    torch.save({"model": tensors}, tmp_path / "a.pth")
    checkpoint.convert(tmp_path / "a.pth", tmp_path / "hf", "transformers", norm_pix_loss=False, **HEADS)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    checkpoint.convert(tmp_path / "hf", tmp_path / "b.pth", "official")
    written = torch.load(tmp_path / "b.pth", weights_only=True)
    assert written.keys() == {"model"}
    assert list(written["model"]) == list(tensors)
    assert_same_weights(written["model"], tensors)
    assert (tmp_path / "b.pth").stat().st_size < 1.2 * (tmp_path / "a.pth").stat().st_size  # tensors, not the file each maps


@pytest.mark.parametrize("name", ["timm.safetensors", "timm.pth"])
def test_convert_for_timm(model, official, tmp_path, name):
    """timm's vit_*.mae: these names, no head."""
    report = checkpoint.convert(official, tmp_path / name, "timm")
    written = (safetensors.load_file if name.endswith("safetensors") else partial(torch.load, weights_only=True))(tmp_path / name)
    block = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    modules = ["patch_embed.proj", *(f"blocks.{i}.{module}" for i in range(2) for module in block), "norm"]
    parameters = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    assert written.keys() == {"cls_token", "pos_embed"} | parameters
    assert set(report.unexpected) == model.state_dict().keys() - written.keys()
    target = trained(seed=1)
    checkpoint.load(target, tmp_path / name)
    assert_same_weights(encoder_of(target), encoder_of(model))


def test_names_and_shapes_of_timm(tmp_path):
    """The list is from timm 1.0.31, vit_base_patch16_224: timm needs a torchvision."""
    lines = (Path(__file__).parent / "layouts" / "timm_vit_base_patch16_224.txt").read_text().splitlines()
    theirs = {name: tuple(map(int, shape)) for name, *shape in map(str.split, lines)}
    torch.save(maefast.mae_vit_base_patch16().half().state_dict(), tmp_path / "ours.pth")
    checkpoint.convert(tmp_path / "ours.pth", tmp_path / "timm.pth", "timm")
    written = torch.load(tmp_path / "timm.pth", weights_only=True, mmap=True)
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == theirs


def test_convert_from_a_folder_of_timm(model, tmp_path):
    """timm's config.json tells the size of the images."""
    stored = with_trained_positions((24, 40), tmp_path / "tuned.pth")
    tensors = torch.load(tmp_path / "tuned.pth", weights_only=True)["model"]
    config = {"architecture": "vit_base_patch16_224", "num_classes": 0, "pretrained_cfg": {"input_size": [3, 24, 40]}}
    folder = checkpoints.write_hugging_face(tmp_path / "timm", encoder_of(tensors), config)
    target = trained(img_size=(24, 40))
    assert checkpoint.load(target, folder).positions == ()
    assert torch.equal(target.pos_embed, stored)


def test_eps_that_a_layout_cannot_hold(tmp_path):
    trained(norm_layer=nn.LayerNorm).save_pretrained(tmp_path / "own")
    report = checkpoint.convert(tmp_path / "own", tmp_path / "out.pth", "official")
    assert report.warnings == ("the layout has no place for the LayerNorm eps, 1e-05; its models take 1e-06",)


def test_convert_takes_the_target_from_the_caller(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    report = checkpoint.convert(tmp_path / "bare.pth", tmp_path / "unknown", "transformers", **HEADS)
    assert "norm_pix_loss is written as false" in report.warnings[0]
    report = checkpoint.convert(tmp_path / "bare.pth", tmp_path / "known", "transformers", norm_pix_loss=True, **HEADS)
    assert report.warnings == ()
    assert json.loads((tmp_path / "known" / "config.json").read_text())["norm_pix_loss"] is True
