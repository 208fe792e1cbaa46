"""What labels of lists, shards and arrays mean, and labelled sources in the commands."""

import json
import re
from pathlib import Path

import image_files
import numpy as np
import pytest
import support
import torch
from PIL import Image

import maefast
from maefast import cli
from maefast.train.data.open import open_images
from maefast.train.errors import UserError

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
SIZES |= {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_list(*labels: object, start: str = "", name: str = "list.txt") -> str:
    """A list of images 0.png, 1.png, ..., each with its label; none for None."""
    for i in range(len(labels)):
        Image.new("RGB", (8, 8)).save(f"{i}.png")
    lines = (f"{i}.png" + ("" if label is None else f" {label}") for i, label in enumerate(labels))
    Path(name).write_text(start + "\n".join(lines) + "\n", "utf-8")
    return name


def write_tar(labels, name="a.tar", values=None) -> str:
    members = {}
    for i, label in enumerate(labels):
        grey = 25 * i if values is None else values[i]
        members[f"{i:03}.png"] = image_files.encoded(Image.new("RGB", (16, 16), (grey,) * 3), "PNG")
        members |= {} if label is None else {f"{i:03}.cls": str(label).encode()}
    image_files.write_tar(Path(name), members)
    return name


def write_npy(labels, folder="npy", dtype="int64") -> str:
    Path(folder).mkdir()
    np.save(f"{folder}/images.npy", np.stack([np.full((16, 16, 3), 25 * i, np.uint8) for i in range(len(labels))]))
    np.save(f"{folder}/labels.npy", np.array(labels, dtype))
    return f"{folder}/images.npy"


WRITERS = {"list": write_list, "tar": lambda *labels: write_tar(labels), "npy": lambda *labels: write_npy(labels)}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    ("given", "labels", "classes"),
    [
        ((2, 0), [2, 0], ("0", "1", "2")),
        ((2, 10, -1), [2, 10, -1], tuple(map(str, range(11)))),
        ((-1, -1), [-1, -1], ()),
        ((20240131, 0, -1, 9), [2, 0, -1, 1], ("0", "9", "20240131")),
        ((999_999, 1), [999_999, 1], tuple(map(str, range(1_000_000)))),
        ((1_000_000, 1), [1, 0], ("1", "1000000")),
    ],
)
def test_numbers(kind, given, labels, classes) -> None:
    data = open_images(WRITERS[kind](*given))
    assert (data.labels.tolist(), data.classes) == (labels, classes)


@pytest.mark.parametrize("kind", ["list", "tar"])
def test_numbers_beyond_int64(kind) -> None:
    data = open_images(WRITERS[kind](10**20, 7, 10**20))
    assert (data.labels.tolist(), data.classes) == ([1, 0, 1], ("7", str(10**20)))


@pytest.mark.parametrize(
    ("given", "labels", "classes"),
    [
        (("tabby", "-1", None, "cat"), [1, -1, -1, 0], ("cat", "tabby")),
        (("007", "7", "08"), [7, 7, 8], tuple(map(str, range(9)))),
        (("n02", "n01"), [1, 0], ("n01", "n02")),
        (("3d", "²"), [0, 1], ("3d", "²")),
    ],
)
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_list(given, labels, classes, start) -> None:
    data = open_images(write_list(*given, start=start))
    assert (data.labels.tolist(), data.classes) == (labels, classes)


@pytest.mark.parametrize("end", ["\r\n", "\n\n", "\t\n"])
def test_ends_of_lines(end) -> None:
    write_list(1, 0)
    Path("list.txt").write_bytes(f"\ufeff0.png 1{end}1.png\t0{end}".encode())
    assert open_images("list.txt").labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((2, "1.0", 3), "in line 2 it is '1.0'"),
        ((2, "-2"), "in line 2 it is '-2'"),
        (("nan", 1), "in line 1 it is 'nan'"),
        (("1e3",), "in line 1 it is '1e3'"),
        (("9" * 5000, 1), f"in line 1 it is '{'9' * 41}'"),
        ((1, None, "cat"), "must have labels that are all numbers or all names; line 1 has '1', line 3 has 'cat'"),
    ],
)
def test_labels_that_a_list_must_not_have(capsys, tmp_path, given, said) -> None:
    write_list(*given)
    assert said in support.refused(capsys, "pack", "list.txt", "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "dtype", "said"),
    [
        ([-2, 0], "int64", "must hold numbers of classes, or -1 for no label; it holds -2"),
        ([1.0, 0.0], "float32", "must hold integers of the shape (2,); it holds float32"),
    ],
)
def test_labels_that_an_array_must_not_have(values, dtype, said) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        open_images(write_npy(values, dtype=dtype))


def test_an_array_of_labels_beyond_int64() -> None:
    data = open_images(write_npy([2**64 - 1, 3], dtype="uint64"))
    assert (data.labels.tolist(), data.classes) == ([1, 0], ("3", str(2**64 - 1)))


def test_a_list_beside_the_folder_of_its_images(tmp_path) -> None:
    """ImageNet's validation images: one flat folder, and a text file beside it."""
    (tmp_path / "val").mkdir()
    Image.new("RGB", (8, 8)).save("val/a.png")
    Path("val.txt").write_text("a.png n01\n")
    data = open_images("val.txt")
    assert (data.paths, data.classes) == (["val/a.png"], ("n01",))
    with pytest.raises(UserError, match=r"its 'val' split may be \./val or \./val\.txt|may be val or val\.txt"):
        open_images(".", "val")


COUNT = 8


def labelled(kind: str, split: str) -> str:
    """A part of COUNT grey images of two classes, all of one value each; its path."""
    labels = [i % 2 for i in range(COUNT)]
    if kind == "tar":
        return write_tar(labels, f"{split}.tar")
    if kind == "npy":
        return write_npy(labels, split)
    for i, label in enumerate(labels):
        folder = Path("folders", split, str(label)) if kind == "folder" else Path("img")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (25 * i,) * 3).save(folder / f"{split}{i}.png")
    if kind == "folder":
        return f"folders/{split}"
    Path(f"{split}.txt").write_text("".join(f"img/{split}{i}.png {label}\n" for i, label in enumerate(labels)))
    return f"{split}.txt"


SHORT = ("--epochs=1", "--warmup_epochs=0", "--batch_size=4")
COMMANDS = {"knn": ("--k=1",), "linprobe": (*SHORT, "--blr=0.1"), "finetune": SHORT, "partial": (*SHORT, "--blocks=1")}


@pytest.fixture
def mae():
    torch.manual_seed(0)
    maefast.MAE(**SIZES).save_pretrained("mae")


@pytest.mark.parametrize("kind", ["list", "tar", "npy", "folder"])
@pytest.mark.parametrize("command", COMMANDS)
def test_val_path(mae, capsys, command, kind) -> None:
    train, val = labelled(kind, "train"), labelled(kind, "val")
    assert cli.main([command, "mae", train, f"--val_path={val}", *COMMANDS[command]]) == 0
    streams = capsys.readouterr()
    assert f"of {COUNT} images)" in streams.out.splitlines()[-1]
    told = [line for line in streams.err.splitlines() if line.endswith(f": {COUNT} images, 2 classes")]
    assert [line.split(" (")[0] for line in told] == [train, val]
    if command == "knn":  # each image has a neighbour of its own value, of its own label
        assert "top-1 1.0000" in streams.out


@pytest.mark.parametrize("kind", ["list", "tar", "npy"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_is_one_part(mae, capsys, tmp_path, command, kind) -> None:
    train = labelled(kind, "train")
    before = sorted(tmp_path.rglob("*"))
    line = support.refused(capsys, command, "mae", train, *COMMANDS[command])
    assert f"--val_path must be given if DATA is one file, for the images to score; DATA is {train}" in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("layout", ["lists", "lists in folders", "shards", "packed"])
def test_parts_of_a_folder(mae, capsys, tmp_path, layout) -> None:
    kind = {"shards": "tar", "packed": "npy"}.get(layout, "list")
    for split in ("train", "val"):
        path = Path(labelled(kind, split))
        if layout == "lists in folders":
            (tmp_path / split).mkdir()
            (tmp_path / split / "list.txt").write_text(path.read_text().replace("img/", "../img/"))
            path.unlink()
    (tmp_path / "data").mkdir()
    for path in set(tmp_path.iterdir()) - {tmp_path / "mae", tmp_path / "data"}:
        path.rename(tmp_path / "data" / path.name)
    assert cli.main(["knn", "mae", "data", "--k=1"]) == 0
    assert "top-1 1.0000 (8 of 8 images)" in capsys.readouterr().out


def test_val_path_that_has_parts_gives_the_one_to_score(mae, capsys) -> None:
    labelled("folder", "train")
    labelled("folder", "val")
    for split, count in (("val", COUNT), ("train", COUNT)):
        assert cli.main(["knn", "mae", "folders", "--val_path=folders", f"--eval_split={split}", "--k=1"]) == 0
        assert f"folders/{split} (image files, split {split}): {count} images" in capsys.readouterr().err.splitlines()[-1]
    line = support.refused(capsys, "knn", "mae", "folders", "--val_path=folders", "--eval_split=test", "--k=1")
    assert "folders has no 'test' split" in line


def test_numbered_classes_that_end_earlier_in_the_part_to_score(mae, capsys) -> None:
    train = write_tar([0, 1, 2, 2], "train.tar", [0, 80, 160, 160])
    val = write_tar([1, 0], "val.tar", [80, 0])
    assert cli.main(["knn", "mae", train, f"--val_path={val}", "--k=1"]) == 0
    assert "top-1 1.0000 (2 of 2 images)" in capsys.readouterr().out
    line = support.refused(capsys, "knn", "mae", val, f"--val_path={train}", "--k=1")
    assert "DATA must have the same classes in both splits; val.tar and train.tar have different ones" in line


@pytest.mark.parametrize("kind", ["list", "tar", "npy"])
def test_robustness_of_a_file(mae, capsys, kind) -> None:
    train, val = labelled(kind, "train"), labelled(kind, "val")
    assert cli.main(["finetune", "mae", train, f"--val_path={val}", *SHORT, "--output_dir=out"]) == 0
    assert cli.main(["robustness", "out/checkpoint.pth", val, "--kinds=none", "--out=r.json"]) == 0
    assert json.loads(Path("r.json").read_text())["images"] == COUNT


@pytest.mark.parametrize("kind", ["list", "tar", "npy"])
def test_extract_and_reconstruct_of_a_file(mae, capsys, kind) -> None:
    data = labelled(kind, "val")
    assert cli.main(["extract", "mae", data, "out.npy"]) == 0
    assert np.load("out.npy").shape == (COUNT, SIZES["embed_dim"])
    assert cli.main(["reconstruct", "mae", data, "out.png", "--count=2"]) == 0
    assert f"{data} (" in capsys.readouterr().err


def test_ablate_of_files(capsys) -> None:
    train, val = labelled("list", "train"), labelled("list", "val")
    sizes = [f"--{name}={value}" for name, value in SIZES.items() if name != "img_size"]
    budget = ["--epochs=1", "--batch_size=4", "--probe_epochs=1", "--finetune_epochs=1", "--num_workers=0", "--probe_blr=0.1"]
    command = ["ablate", train, f"--val_path={val}", "--axes=mask_ratio", "--input_size=16", *sizes, *budget, "--output_dir=out"]
    assert cli.main(command) == 0
    assert len(json.loads(Path("out/table.json").read_text())) == 4
