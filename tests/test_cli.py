"""The command line: bad arguments end in one line on stderr and exit code 2, with nothing written."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import refused, small_mae

from maefast import __version__, cli


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--steps", "0"),
        ("--steps", "-3"),
        ("--steps", "ten"),
        ("--steps", "1.5"),
        ("--batch-size", "0"),
        ("--mask-ratio", "0"),
        ("--mask-ratio", "1"),
        ("--mask-ratio", "nan"),
        ("--mask-ratio", "much"),
        ("--seed", "-1"),
        ("--seed", str(2**63)),
    ],
)
def test_bad_value(capsys: pytest.CaptureFixture[str], tmp_path: Path, option: str, value: str) -> None:
    line = refused(capsys, "demo", f"{option}={value}")
    assert f"argument {option}: must be a " in line
    assert repr(value) in line
    assert list(tmp_path.iterdir()) == []


def test_mask_ratio_that_keeps_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = refused(capsys, "demo", "--mask-ratio=0.97")
    assert "--mask-ratio must keep one patch and remove one, or more of each; 0.97 keeps 0 of the 16 patches of digits" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [(), ("train",), ("demo", "--frobnicate")])
def test_unknown_command_or_option(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    assert "maefast" in refused(capsys, *arguments)


def test_empty_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.txt").write_text("no image")
    line = refused(capsys, "demo", "--data=data", "--output=out")
    assert line.startswith("maefast demo: error: data must hold images")
    assert "there is none below it" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_data_is_no_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    line = refused(capsys, "demo", f"--data={name}", "--output=out")
    assert f"{name} must be a folder of images; it is " in line
    assert not (tmp_path / "out").exists()


def test_only_unreadable_images(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    line = refused(capsys, "demo", "--data=data", "--output=out")
    assert "0 of 1 files could be read" in line
    assert "data/broken.png: " in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("output", ["file", "file/below", "file/far/below"])
def test_unwritable_output(capsys: pytest.CaptureFixture[str], tmp_path: Path, output: str) -> None:
    (tmp_path / "file").write_text("precious")
    line = refused(capsys, "demo", f"--output={output}")
    assert f"--output must be a folder that can be written; {output} cannot be: file is not a folder" in line
    assert (tmp_path / "file").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_output_without_permission(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("maefast.train.files.tempfile.TemporaryFile", refuse)  # root may write anywhere
    line = refused(capsys, "demo", "--output=out")
    assert "--output must be a folder that can be written; out cannot be: Permission denied" in line
    assert list(tmp_path.iterdir()) == []


def test_missing_extra(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maefast.train.errors.find_spec", lambda name: None if name in ("sklearn", "tqdm") else object())
    line = refused(capsys, "demo")
    assert line == 'maefast demo: error: the demo needs scikit-learn, tqdm: pip install "maefast[demo]"\n'
    assert list(tmp_path.iterdir()) == []


def test_interrupted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(**options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("maefast.train.demo.demo.demo", interrupt)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "maefast demo: interrupted\n"


def test_python_m_maefast() -> None:
    done = subprocess.run([sys.executable, "-m", "maefast", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"maefast {__version__}\n"


def test_convert(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": small_mae().state_dict(), "epoch": 3}, "in.pth")
    assert cli.main(["convert", "in.pth", "out.pth", "--to=timm"]) == 0
    out = capsys.readouterr().out
    assert "in.pth: official layout, with decoder" in out
    assert "ignored: epoch" in out
    written = torch.load("out.pth", weights_only=True)
    assert all(torch.equal(tensor, small_mae().state_dict()[name]) for name, tensor in written.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere.pth", "out.pth", "--to=timm"), "nowhere.pth does not exist"),
        (("text.pth", "out.pth", "--to=timm"), "text.pth is neither a file of torch.save nor of safetensors"),
        (("in.pth", "text.pth", "--to=timm"), "out must not exist yet; text.pth does"),
        (("in.pth", "far/out.pth", "--to=timm"), "out must be in a folder that exists; far does not"),
        (("in.pth", "out", "--to=transformers", "--num-heads=4"), "decoder_num_heads must be given"),
        (("in.pth", "out", "--to=keras"), "argument --to: invalid choice: 'keras'"),
        (("in.pth", "out.pth"), "the following arguments are required: --to"),
        (("in.pth", "out", "--to=transformers", "--num-heads=0"), "argument --num-heads: must be a whole number, 1 or more"),
    ],
)
def test_convert_bad_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str) -> None:
    torch.save({"model": small_mae().state_dict()}, "in.pth")
    (tmp_path / "text.pth").write_text("precious")
    assert message in refused(capsys, "convert", *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pth", "text.pth"]
    assert (tmp_path / "text.pth").read_text() == "precious"
