"""The command line: bad arguments give one line on stderr and exit code 2, and write nothing."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from support import refused, small_mae

from maefast import __version__, cli
from maefast.cli.parser import with_underscores
from maefast.train.pretrain.options import Options

# command -> argument or flag -> default
COMMANDS = json.loads(Path(__file__).with_name("commands.json").read_text())


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def parser_of(command: str) -> argparse.ArgumentParser:
    (subparsers,) = (action for action in cli.build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return subparsers.choices[command]


def test_commands() -> None:
    assert sorted(cli.COMMANDS) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_flags(command: str) -> None:
    of_options = {field.name: field.default for field in fields(Options)}
    found = dict[str, object]()
    for action in parser_of(command)._actions:
        default = of_options.get(action.dest) if action.default is argparse.SUPPRESS else action.default
        found |= dict.fromkeys(action.option_strings or [action.dest], default)
    del found["-h"], found["--help"]
    cores = min(10, os.cpu_count() or 1)
    wanted = {name: cores if default == "min(10, cores)" else default for name, default in COMMANDS[command].items()}
    assert json.loads(json.dumps(found, default=str)) == wanted


@pytest.mark.parametrize("command", COMMANDS)
def test_a_flag_has_underscores_and_is_known_by_dashes_too(command: str) -> None:
    flags = [name for name in COMMANDS[command] if name.startswith("--")]
    assert flags
    assert not [name for name in flags if "-" in name[2:]]
    assert with_underscores(["--" + name[2:].replace("_", "-") for name in flags]) == flags


@pytest.mark.parametrize(
    "line",
    [
        "demo --batch-size 4 --mask-ratio=0.5",
        "convert a b --to timm --no-norm-pix-loss --stored-grid 2 3",
        "pretrain --data-path=a --no-pin-mem --mask_tokens-in-encoder",
        "finetune a b --accum-it 2 --cls-token",
        "submit --job-dir a --comment=b",
        "knn a b --crop-pct 0.5",
    ],
)
def test_dashes_and_underscores_in_a_flag_are_the_same(line: str) -> None:
    underscores = line.replace("-", "_").replace("__", "--")
    given, wanted = (vars(cli.build_parser().parse_args(words.split())) for words in (line, underscores))
    assert given == wanted


def test_values_keep_their_dashes() -> None:
    words = ["submit", "--job-dir", "a-b", "--comment=--x-y", "--an-y b-c", "-1", "-a-b", "--", "--a-b"]
    assert with_underscores(words) == ["submit", "--job_dir", *words[2:]]


@pytest.fixture
def nothing_written(tmp_path: Path) -> Iterator[None]:
    yield
    assert list(tmp_path.iterdir()) == []


BAD = {"steps": ("0", "-3", "ten", "1.5"), "batch_size": ("0",), "mask_ratio": ("0", "1", "nan", "much")}
BAD |= {"seed": ("-1", str(2**63))}


@pytest.mark.parametrize(("option", "value"), [(option, value) for option, values in BAD.items() for value in values])
def test_bad_value(capsys: pytest.CaptureFixture[str], nothing_written: None, option: str, value: str) -> None:
    line = refused(capsys, "demo", f"--{option}={value}")
    assert f"argument --{option}: must be a " in line
    assert repr(value) in line


def test_mask_ratio_that_keeps_nothing(capsys: pytest.CaptureFixture[str], nothing_written: None) -> None:
    line = refused(capsys, "demo", "--mask_ratio=0.97")
    assert "--mask_ratio must keep at least one patch and remove at least one; 0.97 keeps 0 of the 16 patches of digits" in line


@pytest.mark.parametrize("arguments", [(), ("train",), ("demo", "--frobnicate")])
def test_unknown_command_or_option(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    assert "maefast" in refused(capsys, *arguments)


def test_empty_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.txt").write_text("no image")
    line = refused(capsys, "demo", "--data=data", "--output=out")
    assert line.startswith("maefast demo: error: data must hold images")
    assert "must hold images (.bmp" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_data_is_no_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    assert f"{name} must be a folder of images; it " in refused(capsys, "demo", f"--data={name}", "--output=out")
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


def test_output_without_permission(capsys, nothing_written, monkeypatch) -> None:
    refuse = Mock(side_effect=PermissionError(13, "Permission denied"))  # root may write anywhere
    monkeypatch.setattr("maefast.train.files.tempfile.TemporaryFile", refuse)
    line = refused(capsys, "demo", "--output=out")
    assert "--output must be a folder that can be written; out cannot be: Permission denied" in line


def test_missing_extra(capsys, nothing_written, monkeypatch) -> None:
    monkeypatch.setattr("maefast.train.errors.find_spec", lambda name: None if name in ("sklearn", "tqdm") else object())
    assert refused(capsys, "demo") == 'maefast demo: error: the demo needs scikit-learn, tqdm: pip install "maefast[demo]"\n'


def test_interrupted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maefast.train.demo.demo.demo", Mock(side_effect=KeyboardInterrupt))
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
        (("in.pth", "out", "--to=transformers", "--num_heads=4"), "decoder_num_heads must be given"),
        (("in.pth", "out", "--to=keras"), "argument --to: invalid choice: 'keras'"),
        (("in.pth", "out.pth"), "the following arguments are required: --to"),
        (("in.pth", "out", "--to=transformers", "--num_heads=0"), "argument --num_heads: must be a whole number, 1 or more"),
    ],
)
def test_convert_bad_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str) -> None:
    torch.save({"model": small_mae().state_dict()}, "in.pth")
    (tmp_path / "text.pth").write_text("precious")
    assert message in refused(capsys, "convert", *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pth", "text.pth"]
    assert (tmp_path / "text.pth").read_text() == "precious"
