"""Mean and std of a checkpoint: kept where a layout can hold them, else warned of."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from maefast import MAE, checkpoint, cli
from maefast.backbone import IMAGENET_MEAN, IMAGENET_STD

SIZES: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 192, "depth": 1, "num_heads": 3}
SIZES |= {"decoder_embed_dim": 512, "decoder_depth": 1, "decoder_num_heads": 16}
OURS = [0.5, 0.25, 0.125], [0.25, 0.5, 0.75]
IMAGENET = [list(IMAGENET_MEAN), list(IMAGENET_STD)]


def saved(folder: Path, mean: Any = OURS[0], std: Any = OURS[1], **changes: Any) -> Path:
    torch.manual_seed(0)
    MAE(**SIZES | changes, mean=mean, std=std).save_pretrained(folder / "own")
    return folder / "own"


def statistics(model: MAE) -> list[list[float]]:
    assert model.mean is not None
    assert model.std is not None
    return [[round(value, 6) for value in values.tolist()] for values in (model.mean, model.std)]


def converted(source: Path, to: str) -> tuple[Path, checkpoint.LoadReport]:
    out = source.parent / {"official": "official.pth", "transformers": "theirs", "timm": "encoder.safetensors"}[to]
    return out, checkpoint.convert(source, out, to)


def about_statistics(report: checkpoint.LoadReport) -> list[str]:
    return [warning for warning in report.warnings if "mean" in warning]


@pytest.mark.parametrize("to", ["official", "transformers", "timm"])
def test_convert_tells_where_they_went(tmp_path: Path, to: str) -> None:
    out, report = converted(saved(tmp_path), to)
    [warning] = about_statistics(report)
    assert "[0.5, 0.25, 0.125] and [0.25, 0.5, 0.75]" in warning
    kept = to == "transformers"
    assert ("preprocessor_config.json" in warning, "no place" in warning) == (kept, not kept)
    if kept:
        model = MAE.from_pretrained(out)
        assert statistics(model) == list(OURS)
        assert torch.equal(model.std, MAE.from_pretrained(tmp_path / "own").std)
        images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        assert torch.equal(model.eval().encode(images), MAE.from_pretrained(tmp_path / "own").eval().encode(images))


@pytest.mark.parametrize("to", ["official", "transformers", "timm"])
def test_imagenets_need_no_word(tmp_path: Path, to: str) -> None:
    out, report = converted(saved(tmp_path, *IMAGENET), to)
    assert not about_statistics(report)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(decoder|norm_pix_loss)")
        assert statistics(MAE.from_pretrained(out)) == IMAGENET


def test_transformers_reads_what_is_written(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    out, _ = converted(saved(tmp_path), "transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    assert [list(processor.image_mean), list(processor.image_std)] == list(OURS)
    assert processor.rescale_factor == pytest.approx(1 / 255)


def test_statistics_of_floats_are_not_written_for_pictures(tmp_path: Path) -> None:
    out, report = converted(saved(tmp_path, [-20.0], [8.0], in_chans=1), "transformers")
    assert not (out / "preprocessor_config.json").exists()
    assert [warning for warning in report.warnings if "no place for mean and std of the images, [-20.0] and [8.0]" in warning]


HALVES = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
PREPROCESSORS = {  # what preprocessor_config.json says, and what it means for pixels in 0..1
    "as usual": (HALVES, 0.5, 0.25),
    "numbers": ({"image_mean": 0.5, "image_std": 0.25}, 0.5, 0.25),
    "rescaled to 0..2": (HALVES | {"rescale_factor": 1 / 127.5}, 0.25, 0.125),
    "not rescaled": ({"image_mean": [127.5] * 3, "image_std": [51.0] * 3, "do_rescale": False}, 0.5, 0.2),
    "not normalised": (HALVES | {"do_normalize": False}, 0.0, 1.0),
}


def with_preprocessor(folder: Path, content: Any, **changes: Any) -> Path:
    channels = changes.get("in_chans", 3)
    out, _ = converted(saved(folder, [0.5] * channels, [0.5] * channels, **changes), "transformers")
    (out / "preprocessor_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return out


@pytest.mark.parametrize("name", PREPROCESSORS)
def test_preprocessor_is_read(tmp_path: Path, name: str) -> None:
    content, mean, std = PREPROCESSORS[name]
    got = statistics(MAE.from_pretrained(with_preprocessor(tmp_path, content)))
    assert got == [pytest.approx([mean] * 3), pytest.approx([std] * 3)]


ONE, NONE = (HALVES, 1, [[0.5], [0.25]]), ({"do_resize": True}, 3, IMAGENET)  # a value for all channels; no statistics


@pytest.mark.parametrize(("content", "in_chans", "expected"), [ONE, NONE])
def test_preprocessor_of_fewer_values(tmp_path: Path, content: Any, in_chans: int, expected: Any) -> None:
    assert statistics(MAE.from_pretrained(with_preprocessor(tmp_path, content, in_chans=in_chans))) == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("not JSON", "preprocessor_config.json is not JSON"),
        ({"image_mean": ["a"] * 3, "image_std": [1] * 3}, "is not that of a Masked Autoencoder"),
        ({"image_mean": [0.5] * 3, "image_std": [0.0] * 3}, "std positive"),
        ({"image_mean": [0.1, 0.2], "image_std": [0.5, 0.5]}, "must have 3 values, one a channel; it has 2"),
        (HALVES | {"rescale_factor": 0}, "is not that of a Masked Autoencoder"),
    ],
)
def test_bad_preprocessor(tmp_path: Path, content: Any, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = with_preprocessor(tmp_path, content)
    with pytest.raises(checkpoint.CheckpointError, match=reason):
        MAE.from_pretrained(folder)
    assert cli.main(["convert", str(folder), str(tmp_path / "out.pth"), "--to", "official"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert reason in line
    assert not (tmp_path / "out.pth").exists()


def timm_folder(folder: Path, told: dict[str, Any]) -> Path:
    weights, _ = converted(saved(folder), "timm")
    out = folder / "timm"
    out.mkdir()
    weights.rename(out / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "pretrained_cfg": {"input_size": [3, 8, 8]} | told}
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize(
    ("told", "expected"), [({"mean": [0.5] * 3, "std": [0.25] * 3}, [[0.5] * 3, [0.25] * 3]), ({}, IMAGENET)]
)
@pytest.mark.filterwarnings("ignore:.*the checkpoint holds no decoder")
def test_timms_configuration_is_read(tmp_path: Path, told: dict[str, Any], expected: list[list[float]]) -> None:
    assert statistics(MAE.from_pretrained(timm_folder(tmp_path, told))) == expected


@pytest.mark.filterwarnings("ignore:.*the checkpoint holds no decoder")
def test_timms_configuration_of_before(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path, {"mean": [0.5] * 3, "std": [0.25] * 3})
    config = json.loads((folder / "config.json").read_text())
    about = config.pop("pretrained_cfg")
    (folder / "config.json").write_text(json.dumps(config | about))
    assert statistics(MAE.from_pretrained(folder)) == [[0.5] * 3, [0.25] * 3]


def test_bad_timm_configuration(tmp_path: Path) -> None:
    with pytest.raises(checkpoint.CheckpointError, match="is not that of a Masked Autoencoder"):
        MAE.from_pretrained(timm_folder(tmp_path, {"mean": "dark", "std": [1, 1, 1]}))


@pytest.mark.parametrize("how", ["load", "init_from"])
def test_another_model_than_the_checkpoints(tmp_path: Path, how: str) -> None:
    path, torch_model = saved(tmp_path), MAE(**SIZES)
    report = checkpoint.load(torch_model, path) if how == "load" else torch_model.init_from(path)
    [warning] = about_statistics(report)
    assert warning.startswith("mean and std are [0.5, 0.25, 0.125] and [0.25, 0.5, 0.75] in the checkpoint, and [0.485, ")
    assert statistics(torch_model) == IMAGENET
    same = MAE(**SIZES, mean=OURS[0], std=OURS[1])
    report = checkpoint.load(same, path) if how == "load" else same.init_from(path)
    assert not about_statistics(report)


def test_given_statistics_are_taken_without_a_word(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = MAE.from_pretrained(saved(tmp_path), mean=[0.1] * 3, std=[0.2] * 3)
    assert statistics(model) == [pytest.approx([0.1] * 3), pytest.approx([0.2] * 3)]
