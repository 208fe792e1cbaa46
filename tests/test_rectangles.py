"""Rectangles and images of floats through every command; missing patches have no part in losses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pretraining import ArrayImages, options, pictures, records
from support import assert_equal
from torch import Tensor

from maefast import MAE, checkpoint, cli
from maefast.reference import ReferenceMAE
from maefast.train.data.floats import NormalisedImages, fill_missing
from maefast.train.data.open import open_images
from maefast.train.data.order import epoch_order
from maefast.train.errors import UserError
from maefast.train.pretrain.trainer import pretrain

SIZE, PATCH = (16, 32), (4, 8)
SMALL = "--embed_dim 32 --depth 1 --num_heads 2 --decoder_embed_dim 32 --decoder_depth 1 --decoder_num_heads 2"
RUN = f"{SMALL} --batch_size 4 --epochs 1 --warmup_epochs 0 --num_workers 0 --input_size 16 32 --patch_size 4 8"
HEADS: dict[str, Any] = {"num_heads": 2, "decoder_num_heads": 2}
TINY = {"embed_dim": 16, "depth": 1, "decoder_embed_dim": 16, "decoder_depth": 1, **HEADS}


def maefast(command: str) -> int:
    try:
        return cli.main(command.split())
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def spectrograms(count: int = 8, missing: bool = True) -> np.ndarray:
    """(count, 16, 32, 1) fp32 of mean -20 and spread 8; half of the first one is missing."""
    values = np.random.default_rng(0).normal(-20, 8, (count, *SIZE, 1)).astype(np.float32)
    if missing:
        values[0, :, 16:] = np.nan
    return values


def write_labelled(values: np.ndarray) -> None:
    """A training and a validation part of two classes."""
    for split in ("train", "val"):
        Path("data", split).mkdir(parents=True)
        np.save(f"data/{split}/images.npy", values)
        np.save(f"data/{split}/labels.npy", np.arange(len(values)) % 2)


KINDS = {
    "uint8": (np.random.default_rng(0).integers(0, 256, (8, *SIZE, 1), dtype=np.uint8), ""),
    "floats": (spectrograms(), "--mean -20 --std 8"),
    "float64 of two channels": (np.random.default_rng(0).normal(-20, 8, (8, *SIZE, 2)), "--mean -20,-20 --std 8,8"),
    "float16 with nodata": (np.nan_to_num(spectrograms(), nan=-99).astype(np.float16), "--mean -20 --std 8 --nodata -99"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_command(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    values, flags = KINDS[kind]
    write_labelled(values)
    assert maefast(f"pretrain --data_path data --output_dir run {RUN} {flags} --pictures 2") == 0
    assert maefast(f"pretrain --data_path data --output_dir run {RUN} {flags} --pictures 2 --resume auto --epochs 2") == 0
    assert all(np.isfinite(record["train_loss"]) for record in records(Path("run")))
    weights, nodata = "run/checkpoint-1.pth", "--nodata -99" if "nodata" in kind else ""
    model = MAE.from_pretrained(weights)
    assert (model.patch_embed.img_size, model.patch_embed.patch_size) == (SIZE, PATCH)
    assert maefast(f"extract {weights} data/val features.npy {nodata}") == 0
    features = np.load("features.npy")
    assert features.shape == (8, 32)
    assert np.isfinite(features).all()
    assert maefast(f"extract --input_size 32 64 {weights} data/val larger.npy {nodata} --kind all") == 0
    assert np.load("larger.npy").shape == (8, 1 + 64, 32)
    assert maefast(f"knn {weights} data {nodata} --k 3 --input_size 16 32") == 0
    assert maefast(f"linprobe {weights} data {nodata} --epochs 1 --warmup_epochs 0 --batch_size 8 --blr 0.1") == 0
    assert maefast(f"finetune {weights} data {nodata} --epochs 1 --warmup_epochs 0 --batch_size 8 --output_dir tuned") == 0
    assert maefast(f"robustness tuned/checkpoint.pth data --kinds none {nodata}") == 0
    assert maefast(f"convert {weights} official.pth --to official") == 0
    assert maefast(f"convert {weights} encoder.safetensors --to timm") == 0
    assert MAE.from_pretrained("official.pth", **HEADS).patch_embed.img_size == SIZE
    if values.shape[-1] == 1:
        assert maefast(f"reconstruct {weights} data/val picture.png {nodata} --count 2 --input_size 16 32") == 0
    capsys.readouterr()
    assert maefast(f"convert {weights} theirs --to transformers") == 2
    assert "transformers' ViTMAE takes only squares" in capsys.readouterr().err


def test_features_are_of_normalised_values() -> None:
    values = spectrograms()
    np.save("images.npy", values)
    assert maefast(f"pretrain --data_path images.npy --output_dir run {RUN} --mean -20 --std 8 --pictures 0") == 0
    assert maefast("extract run/checkpoint-0.pth images.npy features.npy") == 0
    x = torch.from_numpy((values + 20) / 8).nan_to_num(0).permute(0, 3, 1, 2).contiguous()
    expected = MAE.from_pretrained("run/checkpoint-0.pth").eval().encode(x)[:, 0].detach()
    assert torch.allclose(torch.from_numpy(np.load("features.npy")), expected, atol=1e-5)


def test_configuration_file() -> None:
    np.save("u8.npy", KINDS["uint8"][0])
    sizes = "input_size: [16, 32]\npatch_size: [4, 8]\nmean: [0.25]\nstd: [0.5]\n"
    Path("run.yaml").write_text(f"data_path: u8.npy\noutput_dir: run\n{sizes}")
    rest = f"{SMALL} --batch_size 4 --epochs 1 --warmup_epochs 0 --num_workers 0 --pictures 0"
    assert maefast(f"pretrain --config run.yaml {rest}") == 0
    model = MAE.from_pretrained("run/checkpoint-0.pth")
    assert (model.patch_embed.img_size, model.mean.tolist(), model.std.tolist()) == (SIZE, [0.25], [0.5])


@pytest.mark.parametrize(("given", "plain"), [((16, 16), 16), ("16 16", 16), ((16, 32), (16, 32)), ("16,32", (16, 32))])
def test_sizes_from_python(given: object, plain: object) -> None:
    assert options(Path("run"), input_size=given).input_size == plain


def test_pack_of_rectangles() -> None:
    Path("photos").mkdir()
    Image.fromarray(np.arange(24 * 32 * 3, dtype=np.uint8).reshape(24, 32, 3)).save("photos/a.png")
    assert maefast("pack photos packed --size 24 32") == 0
    assert torch.equal(open_images("packed").read(0), open_images("photos").read(0))


BAD = {
    "--input_size 16 31 --mean -20 --std 8": "--input_size 16 31: img_size must be a multiple of patch_size",
    "--input_size 0 32": "argument --input_size: must be a whole number, 1 or more; it is '0'",
    "--input_size 1,2,3": "argument --input_size: must be one side, or height and width; it is '1,2,3'",
    "--mean": "argument --mean: expected one argument",
    "--nodata none": "argument --nodata: must be a number; it is 'none'",
    "--augment rrc+jitter --mean 2 --std 8": "--augment must be none, crop or rrc for float images",
    "--mean 2": "--mean and --std must be given for float images, in their own unit",
}


BAD_UNITS = {
    "--mean 123 --std 58": "--mean must lie in 0..1 for uint8 images; it is 123",
    "--mean -20 --std 8": "--mean must lie in 0..1 for uint8 images; it is -20",
    "--mean 0.5 --std 58": "--std must lie in 0..1 for uint8 images; it is 58",
    "--nodata -99": "--nodata must be given only for float arrays; the images are uint8, and it is -99",
}
CASES = [(kind, flags, reason) for kind, bad in (("floats", BAD), ("uint8", BAD_UNITS)) for flags, reason in bad.items()]


@pytest.mark.parametrize(("kind", "flags", "reason"), CASES)
def test_bad_input(kind: str, flags: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("images.npy", KINDS[kind][0])
    assert maefast(f"pretrain --data_path images.npy --output_dir run {RUN} {flags}") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert reason in line
    assert not Path("run").exists()


@pytest.mark.parametrize("flags", ["", "--accum_iter 2", "--target pixel --pictures 2", "--reference"])
def test_nothing_but_missing_values(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("f32.npy", np.full((8, *SIZE, 1), np.nan, np.float32))
    assert maefast(f"pretrain --data_path f32.npy --output_dir run {RUN} --mean 0 --std 1 --pictures 0 {flags}") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    steps = 1 if "accum" in flags else 2
    assert f"--data_path must hold patches without missing values; the removed patches of {steps} steps have none" in line


@pytest.mark.parametrize("accum_iter", [1, 2])
def test_a_batch_without_values_has_no_part_in_the_loss(accum_iter: int) -> None:
    """Two of four batches of one image have none; at a learning rate of zero the weights stay."""
    values = spectrograms(4, missing=False)
    values[[0, 2]] = np.nan
    np.save("f32.npy", values)
    command = f"pretrain --data_path f32.npy --output_dir run {RUN} --mean -20 --std 8 --pictures 0 --augment none --lr 0"
    assert maefast(f"{command} --batch_size 1 --accum_iter {accum_iter}") == 0
    model: Any = MAE.from_pretrained("run/checkpoint-0.pth", **HEADS)
    masks, losses = torch.Generator().manual_seed(0), list[list[float]]()
    order = iter(epoch_order(4, 0, 0))
    for _ in range(4 // accum_iter):
        step = list[float]()
        for noise in torch.rand(accum_iter, model.patch_embed.num_patches, generator=masks):
            if (index := next(order)) % 2:
                image = torch.from_numpy((values[index] + 20) / 8).permute(2, 0, 1)
                step.append(model(image[None], noise=noise[None]).loss.item())
        losses += [step] if step else []
    expected = np.mean([np.mean(step) for step in losses])
    assert records(Path("run"))[0]["train_loss"] == pytest.approx(expected, rel=1e-5)


def test_missing_values_are_found() -> None:
    images = torch.zeros(2, 2, 4, 6)
    images[0, 1, 3, 4] = images[1, 0, 0, 0] = torch.nan
    weights = torch.tensor([[1.0, 1, 1, 0], [0, 1, 1, 1]])
    assert_equal(fill_missing(images, (2, 3)), (torch.zeros(2, 2, 4, 6), weights))
    for whole in (torch.zeros(2, 1, 4, 6), torch.zeros(2, 1, 4, 6, dtype=torch.uint8)):
        same, none = fill_missing(whole, (2, 3))
        assert same is whole
        assert none is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -99.0])
def test_missing_values_of_an_array(value: float) -> None:
    values = spectrograms(missing=False)
    values[1, 2, 3] = value
    np.save("images.npy", values)
    data: Any = open_images("images.npy")
    data.nodata = -99.0
    assert (data.dtype, data.channels) == (torch.float32, 1)
    expected = torch.from_numpy(values[:2]).permute(0, 3, 1, 2).clone()
    expected[1, 0, 2, 3] = torch.nan
    got = data.read_many([0, 1], SIZE, lambda height, width: (0, 0, width, height))
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    smaller = data.read(1, (8, 16))  # the value is part of 4 x 4 or fewer of them
    assert 1 <= smaller.isnan().sum() <= 16
    normalised = NormalisedImages(data, torch.tensor([-20.0]), torch.tensor([8.0]), fill=True)
    assert torch.allclose(normalised.read(1), ((expected[1] + 20) / 8).nan_to_num(0), atol=1e-6)


def small_mae(**changes: object) -> MAE:
    torch.manual_seed(0)
    return MAE(img_size=(8, 16), patch_size=(4, 4), in_chans=1, **TINY | changes)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_weights_of_patches(norm_pix_loss: bool) -> None:
    """The reference's loss is over mask x weights; a patch of weight zero may hold anything."""
    model = small_mae(norm_pix_loss=norm_pix_loss)
    reference = ReferenceMAE(img_size=(8, 16), patch_size=(4, 4), in_chans=1, norm_pix_loss=norm_pix_loss, **TINY)
    reference.load_state_dict(model.state_dict())
    imgs, noise, weights = torch.randn(3, 1, 8, 16), torch.rand(3, 8), torch.rand(3, 8)
    weights[1] = 0
    pred, mask = reference(imgs, 0.5, noise=noise)[1:]
    expected = reference.forward_loss(imgs, pred, mask * weights)
    for return_pred in (True, False):
        loss, got, removed = model(imgs, 0.5, noise=noise, weights=weights, return_pred=return_pred)
        assert torch.allclose(loss, expected, rtol=1e-5)
        assert torch.equal(removed, mask)
        assert (got is None) is not return_pred
    ones = model(imgs, 0.5, noise=noise, weights=torch.ones(3, 8)).loss
    assert torch.equal(ones, model(imgs, 0.5, noise=noise).loss)


@pytest.mark.parametrize(
    ("weights", "error", "text"),
    [
        (torch.ones(2, 8), ValueError, r"weights must be \(N, L\) = \(3, 8\); its shape is \(2, 8\)"),
        (torch.ones(3, 8, dtype=torch.int64), TypeError, "weights must be floating-point; it is int64"),
        (torch.zeros(3, 8), ValueError, "mask is all zeros"),
    ],
)
def test_bad_weights(weights: Tensor, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        small_mae()(torch.zeros(3, 1, 8, 16), 0.5, weights=weights)


def test_reference_has_the_losses(tmp_path: Path) -> None:
    np.save("f32.npy", spectrograms(16))
    flags = f"{RUN} --mean -20 --std 8 --pictures 0 --epochs 2 --augment crop"
    for folder, extra in (("ours", ""), ("plain", "--reference")):
        assert maefast(f"pretrain --data_path f32.npy --output_dir {folder} {flags} {extra}") == 0
    ours, plain = ([record["train_loss"] for record in records(Path(folder))] for folder in ("ours", "plain"))
    assert ours == pytest.approx(plain, rel=1e-4)


def test_components_leave_missing_values_out() -> None:
    np.save("f32.npy", spectrograms())
    assert maefast(f"pretrain --data_path f32.npy --output_dir run {RUN} --mean -20 --std 8 --target pca --pictures 0") == 0
    stored = checkpoint.files.read("run/checkpoint-0.pth").entries["model"]
    assert stored["variant_pca_basis"].isfinite().all()


def test_uint8_goes_its_old_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[Any]()
    forward = MAE.forward

    def watched(self: MAE, imgs: Tensor, *args: Any, **given: Any) -> Any:
        seen.append((imgs.dtype, set(given)))
        return forward(self, imgs, *args, **given)

    monkeypatch.setattr(MAE, "forward", watched)
    pretrain(options(tmp_path / "run"), ArrayImages(pictures()))
    assert seen == [(torch.uint8, {"noise", "return_pred"})] * 4


def test_a_checkpoint_that_tells_no_unit(capsys: pytest.CaptureFixture[str]) -> None:
    """ImageNet's mean and std are not those of floats unasked."""
    torch.save({"model": MAE(img_size=SIZE, patch_size=PATCH, **TINY).state_dict()}, "official.pth")
    np.save("f32.npy", np.zeros((4, *SIZE, 3), np.float32))
    assert maefast("extract official.pth f32.npy features.npy --num_heads 2") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "--mean and --std must be given for float images, in their own unit: the checkpoint does not store them" in line
    assert not Path("features.npy").exists()
    assert maefast("extract official.pth f32.npy features.npy --num_heads 2 --mean -1,0,1 --std 1,1,2") == 0


def test_checkpoint_of_another_unit() -> None:
    np.save("f32.npy", spectrograms())
    np.save("u8.npy", KINDS["uint8"][0])
    assert maefast(f"pretrain --data_path f32.npy --output_dir run {RUN} --mean -20 --std 8 --pictures 0") == 0
    with pytest.raises(UserError, match=r"--mean must lie in 0\.\.1 for uint8 images; it is -20"):
        cli.COMMANDS["extract"].run(vars(cli.build_parser().parse_args(["extract", "run/checkpoint-0.pth", "u8.npy", "a.npy"])))
