"""Options of `maefast pretrain`: what is refused, what a resumed run may change, a config file."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pretraining import ArrayImages, flags, losses, options, pictures, weights
from support import refused

from maefast import cli
from maefast.train import checkpoints
from maefast.train.errors import UserError
from maefast.train.pretrain.options import Options
from maefast.train.pretrain.trainer import pretrain


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain")
    np.save(folder / "images.npy", pictures())
    return folder


BAD = {
    "--model=mae_vit_larg_patch16": "did you mean mae_vit_large_patch16?",
    "--augment=rcc": "did you mean rrc?",
    "--amp=fp32": "did you mean fp16?",
    "--mask_ration=0.5": "unrecognized argument --mask_ration; did you mean --mask_ratio?",
    "--mask_ratio=1": "argument --mask_ratio: must be a number more than 0 and below 1; it is '1'",
    "--mask_ratio=0.99": "--mask_ratio must keep at least one patch and remove at least one; 0.99 keeps 0 of 16",
    "--blr=nan": "argument --blr: must be a number, 0 or more; it is 'nan'",
    "--epochs=0": "argument --epochs: must be a whole number, 1 or more; it is '0'",
    "--input_size=18": "--model mae_vit_large_patch16 cannot be built with --input_size 18",
    "--mean=0.5": "cannot be built",
    "--batch_size=34": "--data_path must hold at least --batch_size x --accum_iter = 34 images",
    "--accum_iter=5": "= 40 images",
    "--start_epoch=2": "--start_epoch must be less than --epochs, 2; it is 2",
    "--device=gpu": "--device must be cpu, cuda or cuda:N; it is 'gpu'",
    "--device=cuda:99": "--device must be a GPU of this machine",
    "--resume=nowhere.pth": "nowhere.pth cannot be read: No such file or directory",
    "--sampler=grid --mask_ratio=0.5": "--sampler grid must keep one patch of four",
    "--target=pca --norm_pix_loss": "--target must be norm with --norm_pix_loss; it is pca",
    "--config=nowhere.yaml": "--config must be a file; nowhere.yaml cannot be read",
}


@pytest.mark.parametrize("flag", BAD)
def test_bad_options(folder: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert BAD[flag] in refused(capsys, *flags(folder / "images.npy", folder / "bad"), *flag.split())
    assert not (folder / "bad").exists()


def test_a_folder_that_cannot_be_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, *flags(folder / "images.npy", folder / "images.npy" / "out"))
    assert "--output_dir must be a folder that can be written" in line


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("os.listdir", refuse)
    with pytest.raises(PermissionError):
        pretrain(options(tmp_path, resume="auto"), ArrayImages(pictures()))


def test_only_the_same_run_goes_on(tmp_path: Path) -> None:
    data = ArrayImages(pictures())
    pretrain(options(tmp_path), data)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    cases = {
        "--output_dir must hold no earlier run": (options(tmp_path), data),
        "the model's depth is 1, here it is 2": (options(tmp_path, depth=2, resume="auto"), data),
        "the number of images is 33, here it is 30": (options(tmp_path, resume="auto"), ArrayImages(pictures(30))),
        "is damaged or another kind": (options(tmp_path, resume=str(tmp_path / "log.txt")), data),
    }
    for message, (given, images) in cases.items():
        with pytest.raises(UserError, match=message):
            pretrain(given, images)
    torch.save({"model": weights(tmp_path)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"is another kind .MAE.from_pretrained loads"):
        pretrain(options(tmp_path, resume=str(tmp_path / "other.pth")), data)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_an_older_checkpoint_goes_on_elsewhere(tmp_path: Path) -> None:
    """Beside its successors it would be the oldest, and be removed as such."""
    data, first = ArrayImages(pictures()), tmp_path / "first"
    pretrain(options(first, epochs=3), data)
    older = str(first / "checkpoint-0.pth")
    with pytest.raises(UserError, match=r"must hold no later run than .*-0.pth; .* holds checkpoint-2.pth"):
        pretrain(options(first, epochs=3, resume=older), data)
    pretrain(options(tmp_path / "second", epochs=3, resume=older), data)
    assert losses(tmp_path / "second") == losses(first)[1:]


def test_within_an_epoch_the_batches_stay(tmp_path: Path) -> None:
    data = ArrayImages(pictures())
    pretrain(options(tmp_path, save_steps=3, keep=5), data)
    (tmp_path / "checkpoint-0.pth").unlink()
    with pytest.raises(UserError, match="processes is 8, here it is 4"):
        pretrain(options(tmp_path, batch_size=4, resume="auto"), data)


def test_options_in_python() -> None:
    """What a flag takes, as it takes it; the target and --norm_pix_loss agree."""
    given = Options(epochs="3", blr=1, mean=[0.1, 0.2], data_path="images", amp="off", target="norm")
    assert (given.epochs, given.blr, given.mean, given.data_path) == (3, 1.0, (0.1, 0.2), Path("images"))
    assert given.norm_pix_loss
    assert Options(norm_pix_loss=True).target == "norm"
    assert Options().target == "pixel"
    without, typo = "--reference must be given without --mask_tokens_in_encoder", "mae_vit_bas_patch16"
    wrong = {
        "epochs must be a whole number, 1 or more; it is '0'": {"epochs": 0},
        "epochs must be a whole number, 1 or more; it is 'None'": {"epochs": None},
        f"model must be a known name; it is '{typo}': did you mean mae_vit_base_patch16?": {"model": typo},
        "flip must be true or false; it is 1": {"flip": 1},
        "std must be a number more than 0; it is '0'": {"std": (1, 0)},
        f"{without} and --target pca, which the plain model lacks": {"reference": True, "target": "pca"},
        "--target must be norm with --norm_pix_loss; it is pixel": {"norm_pix_loss": True, "target": "pixel"},
    }
    for message, changes in wrong.items():
        with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
            Options(**changes)


def test_config(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = folder / "run.yaml"
    config.write_text("epochs: 1\nblr: 2.5e-3\nnorm_pix_loss: true\namp: off\nmean: [0.1, 0.2, 0.3]\nstd: [1, 1, 1]\nseed: 5\n")
    arguments = flags(folder / "images.npy", folder / "configured")
    assert cli.main([*arguments, f"--config={config}", "--seed=6"]) == 0
    args = checkpoints.read(folder / "configured" / "checkpoint-1.pth")["args"]
    assert (args.epochs, args.norm_pix_loss, args.amp, args.seed) == (2, True, "off", 6)  # the flags say epochs, blr and seed
    assert args.mean == (0.1, 0.2, 0.3)
    wrong = {
        "epoch: 3": "must hold names of options; 'epoch' is none: did you mean epochs?",
        "epochs: many": "epochs must be a whole number, 1 or more; it is 'many'",
        "norm_pix_loss: 1": "norm_pix_loss must be true or false; it is 1",
        "- epochs": "--config must hold options by name",
        "a: [": "--config must be YAML",
    }
    capsys.readouterr()
    for text, message in wrong.items():
        config.write_text(text)
        assert message in refused(capsys, *flags(folder / "images.npy", folder / "bad"), f"--config={config}")
        assert not (folder / "bad").exists()
