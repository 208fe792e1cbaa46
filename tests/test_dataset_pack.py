"""`maefast pack`, and what it refuses: sources that cannot be used as a whole, each in one line."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from image_files import as_tensor, images_array, photograph, solid, write_folder, write_idx, write_tar
from PIL import Image
from support import refused

from maefast import cli
from maefast.train.data.open import open_images

BOX = (30, 20, 150, 110)


def truncate(path: Path, cut: int) -> None:
    os.truncate(path, path.stat().st_size - cut)


def make_bad(kind: str, path: Path) -> Path:
    """A source of this kind that cannot be used as a whole."""
    path.mkdir()
    if kind == "missing":
        return path / "nowhere"
    if kind in ("list", "empty list"):
        (path / "list.txt").write_text("a.png 1\n" if kind == "list" else "\n")
        return path / "list.txt"
    if kind in ("cut tar", "tar without end", "label", "no image in tar"):
        members = {"a.png": solid(1)}
        if kind != "tar without end":
            members["a.cls"] = b"cat" if kind == "label" else b"1"
        if kind == "no image in tar":
            members.pop("a.png")
        write_tar(path / "a.tar", members)
        end = 512 + 512  # of the one member, which is smaller than a block
        if kind in ("cut tar", "tar without end"):
            os.truncate(path / "a.tar", end + 600 * (kind == "cut tar"))
    if kind == "gzip":
        (path / "a.tar").write_bytes(gzip.compress(b"tar"))
    if kind in ("cut npy", "dtype", "axes", "labels"):
        values = images_array(4, *((2, 2, 2, 2) if kind == "axes" else (6, 7)))
        np.save(path / "images.npy", values.astype("int32" if kind == "dtype" else "uint8"))
        if kind == "cut npy":
            truncate(path / "images.npy", 3)
        if kind == "labels":
            np.save(path / "labels.npy", np.arange(3))
    if kind in ("cut idx", "no idx"):
        write_idx(path / "train-images-idx3-ubyte", images_array(4, 6, 7))
        content = (path / "train-images-idx3-ubyte").read_bytes()
        (path / "train-images-idx3-ubyte").write_bytes(content[:-1] if kind == "cut idx" else b"PK" + content)
    if kind == "cut gzip":
        write_idx(path / "train-images-idx3-ubyte.gz", images_array(4, 6, 7))
        truncate(path / "train-images-idx3-ubyte.gz", 20)
    if kind == "unknown":
        (path / "a.zip").write_bytes(b"")
        return path / "a.zip"
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "nowhere does not exist"),
        ("empty folder", "must hold images (.bmp .gif"),
        ("list", "must list files that exist; 1 of 1 do not, such as "),
        ("empty list", "must list images, one per line; it is empty"),
        ("cut tar", "cannot be read as an uncompressed tar file: unexpected end of data"),
        ("tar without end", "its end-of-archive block is missing"),
        ("gzip", "cannot be read as an uncompressed tar file"),
        ("label", "must hold the number of a class, 0 or more; it holds b'cat'"),
        ("no image in tar", "must hold images (.bmp .gif"),
        ("cut npy", "images.npy cannot be read as .npy: mmap length is greater than file size"),
        ("dtype", "must hold uint8 or floats; it holds int32"),
        ("axes", "its shape is (4, 2, 2, 2, 2)"),
        ("labels", "labels.npy must hold integers of the shape (4,); it holds int64 of the shape (3,)"),
        ("cut idx", "cannot be read as an idx file: it holds 167 bytes for the shape (4, 6, 7)"),
        ("no idx", "it starts with 504b00; idx files of uint8 start with 000008"),
        ("cut gzip", "cannot be read as an idx file: Compressed file ended"),
        ("unknown", "a.zip must be a folder, a list (.txt, .lst), .tar, .npy or an idx file"),
    ],
)
def test_bad_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, said: str) -> None:
    assert said in refused(capsys, "pack", str(make_bad(kind, tmp_path / "data")), str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, image = write_folder(tmp_path), photograph(120, 200)
    image.save(folder / "train" / "dog" / "wide.png")
    (folder / "train" / "cat" / "0.png").write_bytes(b"nothing")
    out = tmp_path / "packed" / "train"
    assert cli.main(["pack", str(folder), str(out), "--split", "train", "--size", "100"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"skipped {folder / 'train/cat/0.png'}: UnidentifiedImageError")
    assert printed[1] == f"{out}: 3 images of 100 x 100, 0.1 MB, unreadable images skipped: 1"
    assert np.load(out / "images.npy").shape == (3, 100, 100, 3)
    assert json.loads((out / "classes.json").read_text()) == ["cat", "dog"]
    data = open_images(out.parent, "train")
    assert (data.labels.tolist(), data.classes) == ([0, 1, 1], ("cat", "dog"))
    assert data.read(2).shape == (3, 120, 200)
    crop = data.read(2, (45, 60), lambda height, width: BOX if (height, width) == (120, 200) else (0, 0, 1, 1))
    expected = as_tensor(image.resize((60, 45), Image.Resampling.BICUBIC, box=BOX))
    assert (crop.float() - expected.float()).abs().mean() < 1  # resized twice
    assert [path.name for path in out.parent.iterdir()] == ["train"]


def test_pack_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path)

    def failure(source: Path, out: Path, *options: str) -> str:
        assert cli.main(["pack", str(source), str(out), *options]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "must be a folder that does not exist yet; it exists" in failure(folder, folder)
    np.save(tmp_path / "images.npy", images_array(4, 6, 7))
    assert "must be images to pack; " in failure(tmp_path / "images.npy", tmp_path / "out")
    assert " of free space for the images; it has " in failure(folder, tmp_path / "out", "--size", "10000000")
    assert "cannot be written: " in failure(folder, folder / "train" / "cat" / "1.png" / "out")
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    assert "must hold images that can be read; none of 4 can be, such as " in failure(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "images.npy"]
