"""`maefast pretrain --init`: what runs from weights record, how they resume; --key of commands."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import assert_same_weights
from pretraining import SIZES, ArrayImages, flags, options, pictures, records
from support import refused
from torch import Tensor

from maefast import MAE, cli
from maefast.train import checkpoints
from maefast.train.errors import UserError
from maefast.train.pretrain.trainer import pretrain

NAMES = {"img_size" if name == "input_size" else name: value for name, value in SIZES.items()}
STILL = {"lr": 0.0}  # weights stay as they were


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def source(seed: int = 5, **changes: object) -> MAE:
    torch.manual_seed(seed)
    model = MAE(**NAMES | changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pos_embed" not in name:
                parameter.normal_(std=0.1)
    return model


def save(path: str, **entries: object) -> Path:
    torch.save(entries, path)
    return Path(path)


def newest(folder: Path) -> dict[str, object]:
    return checkpoints.read(checkpoints.find(folder)[-1])


def test_a_run_starts_from_weights(tmp_path, capsys):
    """Weights of any layout; log.txt and the checkpoint name only the file."""
    model = source()
    named = {f"model._orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    path = save("weights.ckpt", state_dict=named, epoch=3)
    pretrain(options(tmp_path / "run", init=path, epochs=2, **STILL), ArrayImages(pictures()))
    entries = newest(tmp_path / "run")
    assert_same_weights(entries["model"], model)
    first, second = records(tmp_path / "run")
    assert first["init"] == entries["run"]["init"]
    assert "init" not in second
    told = {"file": "weights.ckpt", "layout": "official", "source": "state_dict, names after model."}
    told |= {"has_decoder": True, "missing": [], "ignored": ["epoch"]}
    assert {name: first["init"][name] for name in told} == told
    assert str(tmp_path) not in json.dumps(first)
    streams = capsys.readouterr()
    assert "starts from weights.ckpt: official layout, with decoder\n" in streams.out
    assert streams.err.startswith("warning: --init weights.ckpt: the checkpoint does not store whether its target")


def test_other_images_and_another_decoder(tmp_path):
    """Positions are computed, channels averaged, the decoder stays the run's own."""
    model = source(img_size=24, decoder_embed_dim=32)
    path = save("weights.pth", model=model.state_dict())
    pretrain(options(tmp_path / "run", init=path, **STILL), ArrayImages(pictures(channels=1)))
    trained: dict[str, Tensor] = newest(tmp_path / "run")["model"]
    expected = model.patch_embed.proj.weight.sum(dim=1, keepdim=True)
    torch.testing.assert_close(trained["patch_embed.proj.weight"], expected, rtol=0, atol=1e-6)
    assert trained["pos_embed"].shape == (1, 17, 16)
    assert trained["decoder_embed.weight"].shape == (16, 16)
    init = records(tmp_path / "run")[0]["init"]
    assert init["positions"] == ["pos_embed computed as sin-cos for 4 x 4 patches; the file has 6 x 6"]
    assert init["adapted"] == ["patch_embed.proj.weight averaged over the 3 channels of the file for 1, times 3/1"]
    assert init["warnings"][0].startswith("the decoder of the checkpoint is left out, and the model keeps its own: ")


def test_a_run_that_goes_on_has_left_the_weights_behind(tmp_path):
    """It needs no file; its weights are those of an uninterrupted run, and the record stays."""
    path = save("weights.pth", model=source().state_dict())
    changes = {"epochs": 2, "save_steps": 2, "keep": 9, "blr": 1e-2}
    pretrain(options(tmp_path / "whole", init=path, **changes), ArrayImages(pictures()))
    for cut in ("checkpoint-0-2.pth", "checkpoint-0.pth"):
        rest = tmp_path / cut.removesuffix(".pth")
        rest.mkdir()
        shutil.copy(tmp_path / "whole" / cut, rest / cut)
        if cut == "checkpoint-0.pth":
            shutil.copy(tmp_path / "whole" / "log.txt", rest / "log.txt")
        path.unlink(missing_ok=True)
        pretrain(options(rest, init=path, resume="auto", **changes), ArrayImages(pictures()))
        assert_same_weights(newest(rest)["model"], newest(tmp_path / "whole")["model"])
        assert newest(rest)["run"]["init"] == newest(tmp_path / "whole")["run"]["init"]
        assert records(rest)[0]["init"]["file"] == "weights.pth"
        assert "init" not in records(rest)[1]


def test_a_run_that_goes_on_with_other_weights_is_refused(tmp_path):
    data = ArrayImages(pictures())
    path = save("weights.pth", model=source().state_dict())
    pretrain(options(tmp_path / "fresh"), data)
    pretrain(options(tmp_path / "started", init=path), data)
    for folder, init, found in (("fresh", "weights.pth", "None"), ("started", "other.pth", "weights.pth")):
        message = rf"--resume must be a checkpoint of the same run; in .* --init is {found}, here it is {init}"
        with pytest.raises(UserError, match=message):
            pretrain(options(tmp_path / folder, init=init, resume="auto", epochs=2), data)
    pretrain(options(tmp_path / "started", resume="auto", epochs=2), data)  # --init may be left out
    assert newest(tmp_path / "started")["run"]["init"]["file"] == "weights.pth"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"init": "nowhere.pth"}, "--init must be a checkpoint that fits the model: nowhere.pth does not exist"),
        ({"init": "text.pth"}, "--init must be a checkpoint that fits the model: text.pth is neither a file of torch.save"),
        ({"init": "deep.pth"}, "deep.pth does not fit MAE: it has blocks.1.norm1.weight"),
        ({"init": "both.pth"}, "both.pth holds several models; key must name one of model (38 tensors, "),
        ({"init": "both.pth", "key": "average"}, "key must name weights in both.pth, model (38 tensors, "),
        ({"key": "model"}, "--key must be given together with --init, whose weights it chooses; it is model"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, capsys, given, message):
    np.save("images.npy", pictures())
    Path("text.pth").write_text("weights")
    save("deep.pth", model=source(depth=2).state_dict())
    save("both.pth", model=source().state_dict(), model_ema=source(6).state_dict())
    before = sorted(tmp_path.iterdir())
    assert message in refused(capsys, *flags(Path("images.npy"), Path("run"), **given))
    assert sorted(tmp_path.iterdir()) == before


def test_key_of_a_run(tmp_path):
    average = source(6)
    path = save("both.pth", model=source().state_dict(), model_ema=average.state_dict())
    pretrain(options(tmp_path / "run", init=path, key="model_ema", **STILL), ArrayImages(pictures()))
    assert_same_weights(newest(tmp_path / "run")["model"], average)


@pytest.mark.parametrize("key", ["model", "model_ema"])
def test_key_of_convert_and_extract(capsys, key):
    models = {"model": source(), "model_ema": source(6)}
    save("both.pth", **{name: model.state_dict() for name, model in models.items()})
    np.save("images.npy", pictures())
    convert, extract = ("convert", "both.pth", "out.pth", "--to=official"), ("extract", "both.pth", "images.npy", "out.npy")
    extract += ("--num_heads=2", "--kind=all", "--crop_pct=1")
    for command in (convert, extract):
        assert "both.pth holds several models; key must name one of model (38 tensors" in refused(capsys, *command)
    for command in (convert, extract):
        assert cli.main([*command, f"--key={key}"]) == 0
    assert_same_weights(torch.load("out.pth")["model"], models[key])
    torch.save({"model": models[key].state_dict()}, "one.pth")
    assert cli.main(["extract", "one.pth", "images.npy", "one.npy", *extract[4:]]) == 0
    assert np.array_equal(np.load("out.npy"), np.load("one.npy"))
