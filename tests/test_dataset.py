"""Every kind of source that `open_images` takes, crops against plain Pillow, broken files."""

import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import as_tensor, encoded, images_array, photograph, reds, solid, turned_by, write_folder, write_idx, write_tar
from PIL import Image

from maefast.train.data.modes import stretched
from maefast.train.data.open import open_images
from maefast.train.data.sources import TarImages
from maefast.train.errors import UnreadableImage, UserError

BOX = (30, 20, 150, 110)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("channels", [1, 3])
def test_crop_is_pillows(tmp_path: Path, kind: str, channels: int) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(photograph(120, 200), kind))
    data = open_images(tmp_path, channels=channels)
    asked = list[tuple[int, int]]()
    got = data.read(0, (40, 56), lambda height, width: asked.append((height, width)) or BOX)
    expected = Image.open(path).convert("RGB" if channels == 3 else "L").resize((56, 40), Image.Resampling.BICUBIC, box=BOX)
    assert asked == [(120, 200)]
    assert got.dtype == torch.uint8
    assert got.is_contiguous()
    difference = (got.int() - as_tensor(expected).int()).abs().max()
    assert difference <= (1 if (kind, channels) == ("JPEG", 1) else 0)  # a JPEG's own luminance is rounded once less often


def test_as_stored(tmp_path: Path) -> None:
    image = photograph(60, 200)
    image.save(tmp_path / "a.png")
    data = open_images(tmp_path)
    assert torch.equal(data.read(0), as_tensor(image))
    assert torch.equal(data.read(0, box=lambda h, w: (30, 20, 150, 50)), as_tensor(image)[:, 20:50, 30:150])


TRANSPOSES = ["FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"]


def turned(image: Image.Image, orientation: int) -> Image.Image:
    return image if orientation == 1 else image.transpose(Image.Transpose[TRANSPOSES[orientation - 2]])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_large_turned_jpeg_is_decoded_small(tmp_path: Path, orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image = photograph(401, 603)
    image.save(tmp_path / "a.jpg", quality=95, exif=turned_by(orientation))
    decoded = list[tuple[int, int]]()
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *a, **k: decoded.append(self.size) or resize(self, *a, **k))
    box = (51, 27, 351, 377)
    got = open_images(tmp_path).read(0, (32, 24), lambda height, width: box)
    assert decoded == [(151, 101)]  # a quarter: the crop is 75 wide, at least 2 x 24
    expected = resize(turned(image, orientation), (24, 32), Image.Resampling.BICUBIC, box=box)
    assert (got.float() - as_tensor(expected).float()).abs().mean() < 1


@pytest.mark.parametrize("orientation", [3, 6])
def test_turned_tiff(tmp_path: Path, orientation: int) -> None:
    image = photograph(41, 63)
    image.save(tmp_path / "a.tif", exif=turned_by(orientation))
    assert torch.equal(open_images(tmp_path).read(0), as_tensor(turned(image, orientation)))


@pytest.mark.parametrize("box", [(-1, 0, 5, 5), (0, 0, 201, 5), (5, 0, 5, 5), (0, 0, float("nan"), 5)])
def test_box_outside(tmp_path: Path, box: tuple) -> None:
    photograph(60, 200).save(tmp_path / "a.png")
    data = open_images(tmp_path)
    with pytest.raises(ValueError, match=r"box must return 0 <= left .* for height 60 and width 200"):
        data.try_read(0, (8, 8), lambda height, width: box)
    assert data.skipped == {}


def test_bad_arguments(tmp_path: Path) -> None:
    photograph(60, 200).save(tmp_path / "a.png")
    data = open_images(tmp_path)
    with pytest.raises(IndexError, match=r"index must lie in 0\.\.0; it is -1"):
        data.read(-1)
    with pytest.raises(ValueError, match=r"size must be \(height, width\), each 1 or more; it is \(0, 4\)"):
        data.read(0, (0, 4))
    with pytest.raises(ValueError, match="split must be one of train, val, test; it is 'valid'"):
        open_images(tmp_path, "valid")
    with pytest.raises(ValueError, match="channels must be 1 or more; it is 0"):
        open_images(tmp_path, channels=0)


folder = pytest.fixture(write_folder)


def test_folder_splits(folder: Path) -> None:
    train, val, both = (open_images(folder, split) for split in ("train", "val", None))
    assert (reds(train), train.labels.tolist(), train.classes) == ([0, 1, 2], [0, 0, 1], ("cat", "dog"))
    assert (reds(val), val.labels.tolist(), val.classes) == ([3], [0], ("cat",))
    assert (reds(both), both.labels.tolist(), both.classes) == ([0, 1, 2, 3], [0, 0, 1, 0], ("cat", "dog"))
    flat = open_images(folder / "train" / "cat", "train")
    assert (reds(flat), flat.labels.tolist(), flat.classes, flat.channels) == ([0, 1], [-1, -1], (), 3)
    with pytest.raises(UserError, match=r"folder has no 'test' split, such as a folder test$"):
        open_images(folder, "test")
    (folder / "train").rename(folder / "other")
    with pytest.raises(UserError, match="has no 'train' split, such as a folder train or training"):
        open_images(folder, "train")


@pytest.mark.parametrize(
    ("text", "labels", "classes"),
    [
        ("train/cat/0.png\n\n valid/cat/3.png \n", [-1, -1], ()),
        ("train/cat/0.png 2\nvalid/cat/3.png 0\n", [2, 0], ("0", "1", "2")),
        ("train/cat/0.png tabby\nvalid/cat/3.png\n", [0, -1], ("tabby",)),
    ],
)
def test_list(folder: Path, text: str, labels: list[int], classes: tuple[str, ...]) -> None:
    (folder / "list.txt").write_text(text)
    data = open_images(folder / "list.txt")
    assert (reds(data), data.labels.tolist(), data.classes) == ([0, 3], labels, classes)


def test_list_with_spaces_in_a_name(folder: Path) -> None:
    (folder / "my cat.png").write_bytes(solid(9))
    (folder / "list.txt").write_text("my cat.png\nmy cat.png 1\n")
    data = open_images(folder / "list.txt")
    assert (reds(data), data.labels.tolist()) == ([9, 9], [-1, 1])


def test_tar_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "b.tar", {"x/002.png": solid(2), "x/002.cls": b"0", "x/002.json": b"{}"})
    write_tar(tmp_path / "a.tar", {"000.cls": b"3\n", "000.PNG": solid(0), "x/001.png": solid(1), ".000.png": b""})
    data = open_images(tmp_path, "train")
    assert isinstance(data, TarImages)
    assert (reds(data), data.labels.tolist(), data.classes) == ([0, 1, 2], [3, -1, 0], ("0", "1", "2", "3"))
    assert reds(pickle.loads(pickle.dumps(open_images(tmp_path / "b.tar")))) == [2]


@pytest.mark.parametrize("shape", [(6, 7), (6, 7, 3), (3, 6, 7), (6, 7, 5)])
def test_npy(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = images_array(5, *shape)
    np.save(tmp_path / "images.npy", values)
    data = open_images(tmp_path)
    expected = torch.from_numpy(values)
    if shape[0] == 6:
        expected = expected[..., None] if len(shape) == 2 else expected
        expected = expected.permute(0, 3, 1, 2)
    assert data.channels == expected.shape[1]
    assert data.labels.tolist() == [-1] * 5
    for i in range(5):
        assert torch.equal(data.read(i), expected[i])
    for size, part in (((6, 7), (0, 0, 7, 6)), ((4, 5), (1, 2, 6, 6)), ((4, 5), (0, 0, 7, 6)), ((4, 5), (1.5, 0, 6.5, 4))):
        how = (size, lambda height, width, part=part: part)
        assert torch.equal(data.read_many([3, 1], *how), torch.stack([data.read(i, *how) for i in (3, 1)]))
    with pytest.raises(IndexError, match=r"index must lie in 0\.\.4; it is -1"):
        data.read_many([2, -1], (6, 7), lambda height, width: (0, 0, width, height))
    crop = data.read(2, (4, 5), lambda height, width: (1.5, 0, 6, 5.25))
    for plane, source in zip(crop, expected[2], strict=True):  # each channel by itself, as Pillow resizes one
        resized = Image.fromarray(source.numpy()).resize((5, 4), Image.Resampling.BICUBIC, box=(1.5, 0, 6, 5.25))
        assert torch.equal(plane[None], as_tensor(resized))


@pytest.mark.parametrize("size", [(40, 56), (7, 9), (200, 300)])
def test_npy_crop_is_that_of_the_whole_image(tmp_path: Path, size: tuple[int, int]) -> None:
    image = photograph(120, 200)
    np.save(tmp_path / "images.npy", np.array(image)[None])
    box = (60.25, 40.5, 140.75, 80.125)
    expected = as_tensor(image.resize(size[::-1], Image.Resampling.BICUBIC, box=box)).int()
    got = open_images(tmp_path).read(0, size, lambda height, width: box)
    assert (got.int() - expected).abs().max() <= 1  # the box's fractions are rounded to fp32, nearer to 0 or less near
    assert (got.int() != expected).float().mean() < 0.01


def test_npy_labels_classes_and_channels(tmp_path: Path) -> None:
    values = images_array(4, 6, 7)
    np.save(tmp_path / "train_images.npy", values)
    np.save(tmp_path / "train_labels.npy", np.array([1, 0, -1, 1], np.int32))
    (tmp_path / "train_classes.json").write_text('["a", "b"]')
    data = open_images(tmp_path / "train_images.npy", "train", channels=3)
    assert (data.labels.tolist(), data.classes) == ([1, 0, -1, 1], ("a", "b"))
    assert torch.equal(data.read(1), torch.from_numpy(values[1]).expand(3, 6, 7))
    with pytest.raises(UserError, match=r"channels must be 1, as in .*train_images.npy .*; it is 2"):
        open_images(tmp_path / "train_images.npy", channels=2)
    colours = images_array(2, 6, 7, 3)
    np.save(tmp_path / "colours.npy", colours)
    grey = open_images(tmp_path / "colours.npy", channels=1).read(1)
    assert torch.equal(grey, as_tensor(Image.fromarray(colours[1]).convert("L")))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx(tmp_path: Path, suffix: str) -> None:
    for prefix, n in (("train", 4), ("t10k", 2)):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte{suffix}", images_array(n, 6, 7))
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte{suffix}", np.arange(n, dtype=np.uint8))
    train, test, val = (open_images(tmp_path, split) for split in ("train", "test", "val"))
    assert train.labels.tolist() == [0, 1, 2, 3]
    assert test.labels.tolist() == val.labels.tolist() == [0, 1]
    assert len(train.classes) == 4
    assert torch.equal(pickle.loads(pickle.dumps(train)).read(3), torch.from_numpy(images_array(4, 6, 7)[3])[None])


def read_all(data) -> tuple[list[int], list[UnreadableImage]]:
    images = [data.try_read(i) for i in range(len(data))]
    return [image[0, 0, 0].item() for image in images if image is not None], list(data.skipped.values())


def test_unreadable_images_are_listed_and_pass_between_processes(folder: Path) -> None:
    cat = folder / "train" / "cat"
    (cat / "0.png").write_bytes(b"nothing")
    whole = encoded(photograph(300, 300))
    (cat / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    data = open_images(folder, "train")
    with pytest.raises(UnreadableImage, match=r"cat/0.png: UnidentifiedImageError: cannot identify"):
        data.read(0)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        good, skipped = pool.apply(read_all, (data,))
    assert good == [1, 2]
    assert [(Path(error.path).name, "truncated" in error.why) for error in skipped] == [("0.png", False), ("cut.jpg", True)]
    assert data.skipped == {}


def test_tiff_of_many_channels(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    values = images_array(1, 9, 11, 6)[0]
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack", planarconfig="contig")
    tifffile.imwrite(tmp_path / "b.tif", values.transpose(2, 0, 1).copy(), photometric="minisblack")
    tifffile.imwrite(tmp_path / "c.tif", values.astype(np.uint16) * 3, photometric="minisblack", planarconfig="contig")
    Image.new("RGB", (11, 9)).save(tmp_path / "d.png")
    data = open_images(tmp_path)
    assert data.channels == 6
    expected = torch.from_numpy(values).permute(2, 0, 1)
    assert torch.equal(data.read(0), expected)
    assert torch.equal(data.read(1), expected)
    assert torch.equal(data.read(2), torch.from_numpy(stretched(values)).permute(2, 0, 1))
    with pytest.raises(UnreadableImage, match=r"d\.png: ValueError: only a TIFF can be read with 6 channels"):
        data.read(3)
    with pytest.raises(UnreadableImage, match=r"a\.tif: ValueError: it must have 5 channels; it has 6"):
        open_images(tmp_path, channels=5).read(0)


def test_without_tifffile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(solid(1))
    monkeypatch.setattr("maefast.train.errors.find_spec", lambda name: None if name == "tifffile" else name)
    with pytest.raises(UserError, match=r'reading these images needs tifffile: pip install "maefast\[train\]"'):
        open_images(tmp_path, channels=6)
