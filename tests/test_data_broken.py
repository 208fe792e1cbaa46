"""Containers and checkpoints that `make fuzz` found: each is refused in one sentence."""

import gzip
import re
import struct
import zlib

import numpy as np
import pytest
from fuzz.mutations import bombs, with_pickle
from fuzz.originals import encoded, idx, many_bands, npy, small_mae
from PIL import Image

from maefast import checkpoint
from maefast.train.data.open import open_images
from maefast.train.errors import UnreadableImage, UserError

ARRAY = npy(np.zeros((2, 4, 4, 3), np.uint8))
GREY = gzip.compress(idx(np.zeros((2, 40, 40), np.uint8)), mtime=0)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"images.npy": ARRAY.replace(b"}", b"(")}, r"images\.npy cannot be read as \.npy: "),
        ({"images.npy": b"PK\x03\x04" + ARRAY}, r"images\.npy cannot be read as \.npy: "),
        ({"train-images-idx3-ubyte.gz": GREY[:20] + b"\xff" * 8 + GREY[28:]}, "cannot be read as an idx file: "),
        ({"train-images-idx3-ubyte.gz": GREY + gzip.compress(b"a", mtime=0)}, r"it holds more bytes for the shape \(2, 40, 40\)"),
        ({"train-images-idx3-ubyte": b"\0\0\x08\xff" + bytes(2000)}, "it has 255 axes"),
        (
            {"images.npy": ARRAY.replace(b"False", b"Fals_")},
            "cannot be read as .npy: malformed node or string on line 1: <ast.Name object>",
        ),
        ({"images.npy": ARRAY, "sizes.npy": npy(np.array([[0, 4], [4, 4]]))}, "must hold heights and widths, each 1 or more"),
        ({"images.npy": ARRAY, "classes.json": b"[" * 10**5}, r"classes\.json cannot be read: "),
    ],
)
def test_containers(tmp_path, files, said) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        open_images(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("bomb", "said"),
    [
        ("idx.gz of 4 GiB", "it unpacks to 4096 MiB, which must be at most 768; unpack it with gunzip"),
        ("tar that goes backwards", "cannot be read as an uncompressed tar file: "),
        ("tar with a header of 2^40", "cannot be read as an uncompressed tar file: "),
        ("npy of objects", r"cannot be read as \.npy: Array can't be memory-mapped: Python objects in dtype"),
    ],
)
def test_bombs_of_containers(tmp_path, bomb, said) -> None:
    for name, content in bombs()[bomb]().files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        open_images(tmp_path)


@pytest.mark.parametrize(
    ("bomb", "said"),
    [
        ("bytearray of 2^33", "holds a builtins.bytearray, which could run code when it is read, and is refused"),
        ("checkpoint that is a zip bomb", "is a compressed zip archive"),
        ("a deep pickle", "must hold a dict of tensors; it holds a list"),
        ("pickle that runs code", "holds a posix.system, which could run code when it is read, and is refused"),
        ("zip that runs code", "holds a posix.system, which could run code when it is read, and is refused"),
    ],
)
def test_bombs_of_checkpoints(tmp_path, bomb, said) -> None:
    (path,) = (tmp_path / name for name in bombs()[bomb]().files)
    path.write_bytes(*bombs()[bomb]().files.values())
    with pytest.raises(checkpoint.CheckpointError, match=said):
        checkpoint.load(small_mae(), path)


def test_a_checkpoint_whose_pickle_is_large(tmp_path) -> None:
    (tmp_path / "a.pth").write_bytes(with_pickle(b"\x80\x02" + b"]" * (17 << 20) + b"."))
    with pytest.raises(checkpoint.CheckpointError, match="must have a pickle of at most 16 MiB; it has 17 MiB"):
        checkpoint.load(small_mae(), tmp_path / "a.pth")


def test_an_original_that_would_fill_the_memory_is_read_in_a_size(tmp_path) -> None:
    (tmp_path / "images.npy").write_bytes(ARRAY)
    (tmp_path / "sizes.npy").write_bytes(npy(np.array([[2**20, 2**20], [8, 6]])))
    data = open_images(tmp_path)
    assert data.read(0, (4, 4)).shape == (3, 4, 4)
    assert data.read(1).shape == (3, 8, 6)
    with pytest.raises(UnreadableImage, match=r"images\.npy: image 0: its original has 1048576 x 1048576 pixels"):
        data.read(0)


def declaring(kind: str, side: int) -> bytes:
    """A small file whose header declares side x side pixels."""
    if kind == "PNG":
        content = encoded("PNG")
        header = b"IHDR" + struct.pack(">II", side, side) + content[24:29]
        return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
    content = many_bands(np.zeros((20, 24, 6), np.uint8))["compressed"] if kind == "bands" else encoded("TIFF")
    for tag, stored in ((256, 24 if kind == "bands" else 32), (257, 20 if kind == "bands" else 24)):
        found = re.search(struct.pack("<H", tag) + b"[\3\4]\0" + struct.pack("<II", 1, stored), content)
        assert found
        content = content[: found.start()] + struct.pack("<HHII", tag, 4, 1, side) + content[found.end() :]
    return content


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "bands"])
def test_a_header_that_declares_more_than_its_file_can_hold(tmp_path, kind) -> None:
    if kind == "bands":
        pytest.importorskip("tifffile")
    path = tmp_path / ("a.png" if kind == "PNG" else "a.tif")
    path.write_bytes(declaring(kind, 8192))
    values, stored = 8192 * 8192 * (6 if kind == "bands" else 1), path.stat().st_size
    message = f"its header declares {values} values, its {stored} bytes hold at most {4096 * stored}"
    with pytest.raises(UnreadableImage, match=message):
        open_images(tmp_path, channels=6 if kind == "bands" else 3).read(0, (8, 8))


@pytest.mark.parametrize("ending", ["png", "gif", "jpg", "tif"])
def test_a_large_image_of_one_colour_is_sound(tmp_path, ending) -> None:
    compression = {"compression": "tiff_lzw"} if ending == "tif" else {}
    Image.new("RGB", (4100, 4100), (200, 100, 50)).save(tmp_path / f"a.{ending}", **compression)
    assert open_images(tmp_path).read(0, (1, 1)).flatten().tolist() == pytest.approx((200, 100, 50), abs=2)


def test_a_tiff_without_columns(tmp_path) -> None:
    content = encoded("TIFF")
    at = content.index(struct.pack("<HHII", 256, 4, 1, 32))
    (tmp_path / "a.tif").write_bytes(content[: at + 8] + bytes(4) + content[at + 12 :])
    with pytest.raises(UnreadableImage, match=r"a\.tif: \w+: "):
        open_images(tmp_path).read(0)


def test_a_broken_tiff_is_named_once_alone(tmp_path, capfd) -> None:
    """tifffile logs a line for each of its tags."""
    pytest.importorskip("tifffile")
    content = many_bands(np.zeros((20, 24, 6), np.uint8))["compressed"]
    (tmp_path / "a.tif").write_bytes(content[: len(content) // 2])
    data = open_images(tmp_path, channels=6)
    assert data.try_read(0) is None
    assert list(data.skipped) == [0]
    assert capfd.readouterr() == ("", "")
