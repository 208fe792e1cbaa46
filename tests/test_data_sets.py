"""Which images a data set has, what it leaves out, and what is refused as ambiguous."""

import io
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pretraining
import pytest
from image_files import reds, solid
from PIL import Image

from maefast import cli
from maefast.train.data.open import find_images, open_images
from maefast.train.errors import UserError


def put(root: Path, *names: str) -> Path:
    """Images at these paths below root, each with its number as the red of its pixels."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(solid(number))
    return root


def shard(path: Path, *members: str | tarfile.TarInfo) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, member in enumerate(members):
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            content = str(number).encode() if info.name.endswith(".cls") else solid(number)
            info.size = len(content) if info.isfile() else 0
            tar.addfile(info, io.BytesIO(content))
    return path


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("names", "split", "found", "classes"),
    [
        (("train/bus/0.png", "train/train/1.png", "val/bus/2.png"), "train", [0, 1], ("bus", "train")),
        (("bus/0.png", "train/1.png"), "train", [0, 1], ("bus", "train")),
        (("bus/0.png", "val/1.png"), "train", [0, 1], ("bus", "val")),
        (("bus/0.png", "Test/1.png"), None, [1, 0], ("Test", "bus")),
        (("train/good/0.png", "train/test/1.png"), "train", [0, 1], ("good", "test")),
        (("train/cat/0.png", "val/cat/1.png"), None, [0, 1], ("cat",)),
        (("train/cat/0.png", "annotations/a.json"), "train", [0], ("cat",)),
        (("TRAIN/cat/0.png", "Valid/cat/1.png"), "val", [1], ("cat",)),
        (("train/train/0.png", "train/val/1.png", "val/val/2.png", "val/train/3.png"), "val", [3, 2], ("train", "val")),
        (("train2017/cat/0.png", "val2017/cat/1.png"), "train", [0], ("cat",)),
        (("train_2017/cat/0.png", "test2017/cat/1.png"), "test", [1], ("cat",)),
        (("bus/0.png", "train123/1.png"), "train", [0, 1], ("bus", "train123")),
        (("cat/0.png", "cat/@eaDir/0.png", "__MACOSX/cat/0.png", ".trash/0.png"), "train", [0], ("cat",)),
    ],
)
def test_the_name_of_a_part_counts_where_a_part_can_stand(tmp_path, names, split, found, classes) -> None:
    data = open_images(put(tmp_path, *names), split)
    assert (reds(data), data.classes) == (found, classes)
    assert (data.labels >= 0).all()


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (("train/0.png", "val/1.png", "bus/2.png"), "train"),
        (("train/cat/0.png", "extra/cat/1.png"), "train"),
        (("train/cat/0.png", "val/cat/1.png", "extra/2.png"), None),
        (("bus/0.png", "val/1.png"), "val"),
        (("train2017/cat/0.png", "val2017/cat/1.png", "unlabeled2017/2.png"), "train"),
    ],
)
def test_both_readings_of_a_folder_are_named(tmp_path, capsys, names, split) -> None:
    message = "can be read in two ways: as the splits .*, or as the classes .*; give the folder of a split"
    with pytest.raises(UserError, match=message):
        open_images(put(tmp_path / "data", *names), split)
    assert cli.main(["pack", str(tmp_path / "data"), str(tmp_path / "out"), *(["--split", split] if split else [])]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_two_folders_of_one_part(tmp_path) -> None:
    with pytest.raises(UserError, match="must have one folder for each split; it has train, val, validation"):
        open_images(put(tmp_path, "train/0.png", "val/1.png", "validation/2.png"), "val")


@pytest.mark.parametrize("excluded", ["run", "link"])
def test_the_output_is_left_out(tmp_path, excluded) -> None:
    put(tmp_path, "0.png", "run/reconstructions/1.png", "a/2.png")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    data = open_images(tmp_path, "train", exclude=tmp_path / excluded)
    assert reds(data) == [0, 2]
    assert data.left_out == {"in the folder of the output": 2}  # once by each way
    with pytest.raises(UserError, match="must not be the output folder as well"):
        open_images(tmp_path, "train", exclude=tmp_path)


@pytest.mark.parametrize(
    ("names", "run", "excluded", "found", "left_out"),
    [
        (("train/cat/0.png", "val/cat/1.png", "reconstructions/2.png"), ".", ".", [0], {}),  # nothing is written into parts
        (("0.png", "run1/reconstructions/1.png"), "run1", "run2", [0], {"in the folder of another run": 2}),
        (("0.png", "train/1.png"), None, "out", [1], {"beside the splits": 1}),
    ],
    ids=["output beside the parts", "another run", "images beside the parts"],
)
def test_left_out(tmp_path, names, run, excluded, found, left_out) -> None:
    put(tmp_path, *names)
    if run:
        (tmp_path / run / "log.txt").touch()
    data = open_images(tmp_path, "train", exclude=tmp_path / excluded)
    assert (reds(data), data.left_out) == (found, left_out)


def test_an_archive_beside_the_part_that_it_holds(tmp_path) -> None:
    put(tmp_path, "train/cat/0.png", "val/cat/1.png")
    shard(tmp_path / "ILSVRC2012_img_train.tar", "a.png")
    with pytest.raises(UserError, match=r"its 'train' split may be .*/train or .*/ILSVRC2012_img_train\.tar; give"):
        open_images(tmp_path, "train")
    assert reds(open_images(tmp_path, "val")) == [1]


def test_an_output_file_is_left_out(tmp_path) -> None:
    assert reds(open_images(put(tmp_path, "0.png", "out.png"), exclude=tmp_path / "out.png")) == [0]


def test_shards_of_each_part_are_told_apart(tmp_path) -> None:
    for name in ("imagenet-train-000.tar", "imagenet_train_001.tar", "imagenet-val-000.tar"):
        shard(tmp_path / name, f"{name[:-4]}.png")
    train, val, both = (open_images(tmp_path, split) for split in ("train", "val", None))
    assert [len(data) for data in (train, val, both)] == [2, 1, 3]
    assert val.names == ["imagenet-val-000.png"]
    assert train.left_out == {"shards of other splits": 1}
    message = r"has no 'test' split.*; its shards belong to other splits, such as imagenet-train-000\.tar"
    with pytest.raises(UserError, match=message):
        open_images(tmp_path, "test")
    shard(tmp_path / "more.tar", "a.png")
    with pytest.raises(UserError, match=r"can be read in two ways: .* such as more\.tar, do not"):
        open_images(tmp_path, "train")


@pytest.mark.parametrize("name", ["extra.tar", "images.npy"])
def test_a_stray_container_beside_class_folders(tmp_path, name) -> None:
    put(tmp_path, "cat/0.png")
    shard(tmp_path / name, "a.png")
    with pytest.raises(UserError, match=rf"can be read in two ways: .*\({name}\) or image files \(0\.png\)"):
        open_images(tmp_path, "train")


def test_every_format_of_pillow_is_read_or_named(tmp_path) -> None:
    for name, kind in (("a.jpe", "JPEG"), ("b.tga", "TGA"), ("c.dib", "DIB"), ("d.pbm", "PPM"), ("e.pcx", "PCX")):
        Image.new("RGB", (8, 8)).save(tmp_path / name, kind)
    for name in ("f.heic", "g.txt", "h", ".i.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe.png")  # to open it would wait for ever
    if ".avif" in Image.registered_extensions():
        Image.new("RGB", (8, 8)).save(tmp_path / "j.avif")
    data = open_images(tmp_path)
    assert len(data) == 5 + (tmp_path / "j.avif").exists()
    assert all(data.try_read(i) is not None for i in range(len(data)))
    formats = {f"of another format ({ending})": 1 for ending in (".heic", ".txt", "no ending")}
    left_out = {"broken links or special files": 2, "hidden": 1, **formats}
    assert data.left_out == left_out
    told = ", ".join(f"{count} {kind}" for kind, count in left_out.items())
    assert data.described() == f"{tmp_path} (image files, all of it): {len(data)} images, no labels; left out: {told}"


def test_linked_folders_are_folders(tmp_path) -> None:
    put(tmp_path, "cat/0.png", "cat/1.png")
    (tmp_path / "dog").symlink_to(tmp_path / "cat")
    (tmp_path / "cat" / "up").symlink_to(tmp_path)
    assert open_images(tmp_path).labels.tolist() == [0, 0, 1, 1]
    assert len(find_images(tmp_path / "dog")) == 2  # up leads to the folder above, all of which are walked already


@pytest.mark.parametrize(
    ("members", "found", "labels"),
    [
        (("img.001.png", "img.002.png"), [0, 1], [-1, -1]),
        (("img.001.png", "img.001.cls", "img.002.png", "img.002.cls"), [0, 2], [1, 3]),
        (("v1.0/a.png", "v1.0/a.cls"), [0], [1]),
        (("./a.png", "a.cls"), [0], [1]),
        (("a.png", "a.seg.png", "a.cls"), [0], [2]),  # a mask, which is another part of the sample
        (("a.png", link("b.png", "a.png", tarfile.LNKTYPE), "b.cls"), [0, 0], [-1, 2]),
        (("a.png", link("b.png", "a.png", tarfile.SYMTYPE)), [0], [-1]),
        (("train/a.png", "bus/b.png"), [0, 1], [-1, -1]),  # train is a class here
        (("voc/train/train/a.png", "voc/train/bus/b.png"), [0, 1], [-1, -1]),
        (("a.png", "__MACOSX/a.png"), [0], [-1]),
    ],
)
def test_members_of_shards(tmp_path, members, found, labels) -> None:
    data = open_images(shard(tmp_path / "a.tar", *members))
    assert (reds(data), data.labels.tolist()) == (found, labels)
    named = sum(not (name if isinstance(name, str) else name.name).endswith(".cls") for name in members)
    assert len(data) + sum(data.left_out.values()) == named


@pytest.mark.parametrize("root", ["", "imagenet/"])
def test_an_archive_of_several_parts_is_refused(tmp_path, root) -> None:
    path = shard(tmp_path / "a.tar", f"{root}train/cat/0.png", f"{root}val/cat/1.png")
    with pytest.raises(UserError, match=r"a.tar must hold one split; it holds train, val: give a tar file of each"):
        open_images(path, "train")


@pytest.mark.parametrize("name", ["0.npy", "cat/0.npy"])
def test_a_folder_of_single_arrays(tmp_path, name) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    np.save(tmp_path / name, np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UserError, match=r"left out: 1 of another format \(.npy\): stack them into one array \(N, H, W, C\)"):
        open_images(tmp_path)


def test_a_command_says_what_it_opens(tmp_path, capsys) -> None:
    put(tmp_path / "data", "train/cat/0.png", "train/dog/1.png", "val/cat/2.png")
    (tmp_path / "data" / "train" / "notes.txt").write_text("")
    assert cli.main(["pack", str(tmp_path / "data"), str(tmp_path / "out"), "--split", "train"]) == 0
    left_out = "left out: 1 of another format (.txt)"
    assert capsys.readouterr().err == f"{tmp_path}/data/train (image files, split train): 2 images, 2 classes; {left_out}\n"


def test_a_run_within_its_data_goes_on_with_the_same_images(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(put(tmp_path, *(f"{i}.png" for i in range(9))))
    told, options = [], {"resume": "auto", "batch_size": 4, "pictures": 8}
    for epochs in (1, 2):
        assert cli.main(pretraining.flags(Path("."), Path("run"), **options, epochs=epochs)) == 0
        told.append(capsys.readouterr())
    assert (tmp_path / "run" / "reconstructions" / "epoch-0001.png").exists()
    assert told[0].out.startswith(". (image files, all of it): 9 images, no labels\n")
    assert told[0].err == ""
    line = r"warning: \. \(image files, all of it\): 9 images, no labels; left out: \d in the folder of the output\n"
    assert re.fullmatch(line, told[1].err)


def test_scripts_have_names_that_stay() -> None:
    from maefast.train import UserError as TheirError
    from maefast.train import dataset

    assert dataset.open_images is open_images
    assert TheirError is UserError
