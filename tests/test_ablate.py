"""`maefast ablate`: rows that run once, beside the paper's; every axis at the paper's size."""

import json
from pathlib import Path

import pytest
from PIL import Image
from pretraining import SIZES, pictures
from support import refused

from maefast import cli
from maefast.train.ablation.ablate import _check, base_options
from maefast.train.ablation.axes import AXES, rows_of

FLAGS = SIZES | {"epochs": 1, "warmup_epochs": 0, "batch_size": 8, "num_workers": 0}
FLAGS |= {"probe_epochs": 1, "finetune_epochs": 1, "images": 16}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablate")
    for index, array in enumerate(pictures(32)):
        path = folder / ("train" if index < 24 else "val") / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
    return folder


def arguments(data: Path, out: Path, **flags: object) -> list[str]:
    return ["ablate", str(data), *(f"--{name}={value}" for name, value in (FLAGS | {"output_dir": out} | flags).items())]


def run(data: Path, out: Path, **flags: object) -> int:
    return cli.main(arguments(data, out, **flags))


def test_rows_are_run_once(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(data, out, axes="decoder_depth,mask_token") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["default", "decoder_depth=2", "mask_tokens_in_encoder=True"]
    table = json.loads((out / "table.json").read_text())
    values = [("1", "8"), ("2", "12"), ("in the encoder too",) * 2, ("in the decoder alone",) * 2]
    assert [(row["value"], row["paper_value"]) for row in table] == values
    assert [row["paper_linprobe"] for row in table] == [73.5, 73.3, 59.6, 73.5]
    assert all(row[score] * 8 in range(9) for row in table for score in ("linprobe", "finetune"))  # of eight images
    assert table[0]["loss"] == table[3]["loss"] not in (table[1]["loss"], table[2]["loss"])  # the default, once
    ours = " | ".join(f"{100 * table[1][name]:.1f}" for name in ("finetune", "linprobe"))
    assert lines[6] == f"| decoder_depth | 2 | {ours} | 12 | 84.4 | 73.3 |"
    assert (out / "table.md").read_text().splitlines() == lines[3:]
    logs = {path: path.read_text() for path in out.rglob("log.txt")}
    assert len(logs) == 9

    records = (out / "rows.jsonl").read_text().splitlines()
    (out / "rows.jsonl").write_text("\n".join(records[:2]) + "\n")
    assert run(data, out, axes="mask_token,decoder_depth") == 0
    assert capsys.readouterr().out.splitlines() == [*lines[2:5], *lines[7:], *lines[5:7]]
    assert (out / "rows.jsonl").read_text().splitlines() == records
    assert {path: path.read_text() for path in out.rglob("log.txt")} == logs

    assert run(data, out, axes="target", epochs=2) == 2
    assert "must hold only rows of the same options; in " in capsys.readouterr().err


BAD = {
    "axes=sampling,targets": "must be a known name; it is 'targets': did you mean target?",
    "axes=sampling input_size=12": "sampling grid 75 %: --sampler grid must have even numbers of rows and columns",
    "axes=decoder_width decoder_num_heads=16": "decoder_width 4: --model mae_vit_tiny_patch16 cannot be built",
    "axes=mask_ratio images=25": "--images must be at most 24, the images in ",
    "axes=mask_ratio eval_split=test": "has no 'test' split",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_options(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str) -> None:
    assert BAD[flags] in refused(capsys, *arguments(data, tmp_path / "out", **dict(flag.split("=", 1) for flag in flags.split())))
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(data, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(data, tmp_path / "out") == 2
    assert "ablate must run as one process; WORLD_SIZE is 2" in capsys.readouterr().err


def test_every_axis_on_a_model_of_the_paper() -> None:
    """With the paper's own depths and widths; small decoders have as much less."""
    base = base_options({"model": "mae_vit_base_patch16"})
    rows = rows_of(list(AXES), base)
    assert [row.value for row in rows if row.axis == "decoder_depth"] == ["1", "2", "4", "8", "12"]
    assert [row.value for row in rows if row.axis == "decoder_width"] == ["128", "256", "512", "768", "1024"]
    assert [row.name for row in rows].count("default") == len(AXES)
    for row in rows:
        _check(row, base, 3)
    small = rows_of(["decoder_depth", "decoder_width"], base_options({}))
    assert [(row.value, row.paper_value) for row in small[:4]] == [("1", "1"), ("2", "4"), ("4", "8"), ("6", "12")]
    assert [row.value for row in small[4:]] == ["8", "16", "32", "48", "64"]
    (norm,) = (row for row in rows_of(["target"], base_options({"norm_pix_loss": True})) if not row.changes)
    assert norm.value == "norm"
