"""An image means the same in each mode and container: the table of docs/data.md, TIFFs of bands."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from image_modes import ALPHA, CENTRE, GREY, MEMBERS, ORANGE, RGB, RGBA, deep, image, png, table, written_table
from PIL import Image
from support import assert_equal

from maefast.train.data import decode, modes
from maefast.train.data.open import open_images
from maefast.train.errors import UnreadableImage, UserError

CASES = [(mode, container) for mode, (_, containers) in MEMBERS.items() for container in containers]


def tolerance(mode: str, container: str) -> int:
    """Return the grey levels that rounding, or a transform to other colours and back, may cost."""
    lossy = "JPEG" in container or "YCbCr" in container or mode == "L*a*b*"
    return 4 if lossy else 3 if "premultiplied" in container or mode == "palette" else 1


@pytest.mark.parametrize(("mode", "container"), CASES)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_mode_and_container(tmp_path: Path, mode: str, container: str, channels: int) -> None:
    values, containers = MEMBERS[mode]
    path = containers[container](tmp_path)
    got = open_images(path, channels=channels).read(0)
    assert (got.shape, got.dtype) == ((channels, 16, 48), torch.uint8)
    row, column = CENTRE
    assert got[:, row, column].tolist() == pytest.approx(values[channels], abs=tolerance(mode, container))


@pytest.mark.parametrize(("mode", "container"), CASES)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_large_image_is_converted_by_rows_and_bands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str, container: str, channels: int
) -> None:
    data = open_images(MEMBERS[mode][1][container](tmp_path), channels=channels)
    whole = data.read(0, (7, 20))
    monkeypatch.setattr(decode, "LARGE", 0)
    monkeypatch.setattr(modes, "CHUNK", 100)
    assert torch.equal(data.read(0, (7, 20)), whole)


def test_the_documents_have_the_table() -> None:
    assert written_table() == table()


@pytest.mark.parametrize("bits", [2, 4])
def test_transparent_value_of_few_bits(tmp_path: Path, bits: int) -> None:
    picture = np.arange(16, dtype=np.uint8).reshape(1, 16, 1) % 2**bits
    png(picture, (2,), bits)(tmp_path)
    alpha = open_images(tmp_path, channels=4).read(0)[3, 0]
    assert alpha.tolist() == [0 if value == 2 else 255 for value in picture[0, :, 0]]


BANDS = np.random.default_rng(0).integers(0, 256, (24, 32, 6), dtype=np.uint8)
TURNED = {
    2: BANDS[:, ::-1], 3: BANDS[::-1, ::-1], 4: BANDS[::-1], 5: BANDS.transpose(1, 0, 2), 6: np.rot90(BANDS, -1),
    7: np.rot90(BANDS, 2).transpose(1, 0, 2), 8: np.rot90(BANDS),
}  # fmt: skip


def write_tiff(folder: Path, pixels: np.ndarray, **options: object) -> None:
    tifffile.imwrite(folder / "a.tif", pixels, **options)


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("samples", [1, 3, 4, 6])
def test_orientation(tmp_path: Path, orientation: int, samples: int) -> None:
    options: dict[str, object] = {"photometric": "rgb" if samples in (3, 4) else "minisblack"}
    options |= {"planarconfig": "contig"} if samples > 1 else {}
    options |= {"extrasamples": ["unassalpha"]} if samples == 4 else {}
    pixels = BANDS[..., 0] if samples == 1 else BANDS[..., :samples]
    write_tiff(tmp_path, pixels, extratags=[(274, "H", 1, orientation, True)], **options)
    expected = torch.from_numpy(TURNED[orientation][..., :samples].copy()).permute(2, 0, 1)
    data = open_images(tmp_path, channels=samples)
    part = data.read(0, (12, 16), lambda height, width: (3, 2, 19, 14))
    assert_equal((data.read(0), part), (expected, expected[:, 2:14, 3:19]))


PAGES = BANDS.transpose(2, 0, 1)
AXES = {
    "contiguous": (BANDS, {"planarconfig": "contig"}, 6),
    "separate": (PAGES, {"planarconfig": "separate"}, 6),
    "pages, as many as are asked for": (PAGES, {}, 6),
    "pages, of ImageJ's channels": (PAGES, {"imagej": True, "metadata": {"axes": "CYX"}}, 6),
    "three of ImageJ's channels": (PAGES[:3], {"imagej": True, "metadata": {"axes": "CYX"}}, 3),
    "four of OME's channels": (PAGES[:4], {"ome": True, "metadata": {"axes": "CYX"}}, 4),
    "slices of channels": (np.stack([PAGES, 255 - PAGES]), {"imagej": True, "metadata": {"axes": "ZCYX"}}, 6),
    "three pages of bands": (np.stack([BANDS, 255 - BANDS, BANDS // 2]), {"planarconfig": "contig"}, 6),
}


@pytest.mark.parametrize("name", AXES)
def test_axes_of_the_file(tmp_path: Path, name: str) -> None:
    pixels, options, count = AXES[name]
    photometric = {} if "imagej" in options else {"photometric": "minisblack"}
    write_tiff(tmp_path, pixels, **photometric, **options)
    assert torch.equal(open_images(tmp_path, channels=count).read(0), torch.from_numpy(PAGES[:count].copy()))


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_more_bands_than_rows(tmp_path: Path, planar: str) -> None:
    cube = np.random.default_rng(0).integers(0, 256, (8, 12, 40), dtype=np.uint8)
    stored = cube if planar == "contig" else cube.transpose(2, 0, 1)
    write_tiff(tmp_path, stored, photometric="minisblack", planarconfig=planar)
    for given in (None, 40):
        assert torch.equal(open_images(tmp_path, channels=given).read(0), torch.from_numpy(cube).permute(2, 0, 1))


@pytest.mark.parametrize("channels", [1, 3])
def test_first_of_several_grey_pages(tmp_path: Path, channels: int) -> None:
    write_tiff(tmp_path, PAGES, photometric="minisblack")
    expected = torch.from_numpy(PAGES[:1].copy()).expand(channels, -1, -1)
    assert torch.equal(open_images(tmp_path, channels=channels).read(0), expected)


def test_a_fourth_band_is_no_transparency(tmp_path: Path) -> None:
    write_tiff(tmp_path, RGBA, photometric="rgb", extrasamples=["unspecified"])
    row, column = CENTRE
    assert open_images(tmp_path, channels=4).read(0)[:, row, column].tolist() == [*ORANGE, ALPHA]
    assert open_images(tmp_path, channels=3).read(0)[:, row, column].tolist() == [*ORANGE]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_second_band_is_no_transparency(tmp_path: Path, dtype: type) -> None:
    """Nor is it left out: two bands are two channels, by default too."""
    write_tiff(tmp_path, BANDS[..., :2].astype(dtype), photometric="minisblack", planarconfig="contig")
    assert open_images(tmp_path).channels == 2
    with pytest.raises(UnreadableImage, match="it must have 3 channels; it has 2"):
        open_images(tmp_path, channels=3).read(0)
    if dtype == np.uint8:
        assert torch.equal(open_images(tmp_path).read(0), torch.from_numpy(PAGES[:2].copy()))


def test_missing_values_are_black_and_complex_ones_have_no_order(tmp_path: Path) -> None:
    write_tiff(tmp_path, np.array([[np.nan, 1, 2, 3]], np.float32), photometric="minisblack")
    assert open_images(tmp_path, channels=1).read(0).flatten().tolist() == [0, 0, 128, 255]
    write_tiff(tmp_path, BANDS[..., 0].astype(np.complex64), photometric="minisblack")
    with pytest.raises(UnreadableImage, match="its pixels are complex64, which have no order"):
        open_images(tmp_path, channels=1).read(0)


def test_other_numbers_of_bands(tmp_path: Path) -> None:
    write_tiff(tmp_path, BANDS, photometric="minisblack", planarconfig="contig")
    with pytest.raises(UnreadableImage, match="it must have 4 channels; it has 6"):
        open_images(tmp_path, channels=4).read(0)
    image(RGB).save(tmp_path / "a.png")
    (tmp_path / "a.tif").unlink()
    with pytest.raises(UnreadableImage, match="only a TIFF can be read with 6 channels"):
        open_images(tmp_path, channels=6).read(0)


def write_array(folder: Path, shape: tuple[int, ...]) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.save(folder / "images.npy", values)
    return values


ARRAYS = {  # shape, channels asked for, the axis of the bands
    "more bands than rows": ((2, 6, 7, 40), 40, 3),
    "more bands than columns": ((2, 40, 7, 6), 40, 1),
    "fewer bands": ((2, 5, 6, 7), None, 1),
    "fewer bands, last": ((2, 7, 6, 5), None, 3),
    "as many either way": ((2, 6, 7, 6), 6, 3),
    "not as many as asked for": ((2, 3, 6, 7), 1, 1),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_axes_of_an_array(tmp_path: Path, name: str) -> None:
    shape, asked, axis = ARRAYS[name]
    values = write_array(tmp_path, shape)
    got = open_images(tmp_path, channels=asked).read(1)
    expected = torch.from_numpy(np.moveaxis(values[1], axis - 1, 0))
    assert got.shape[1:] == expected.shape[1:]
    if asked != 1:
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("axes", "axis"), [("NHWC", 3), ("NCHW", 1)])
def test_an_array_that_tells_its_axes(tmp_path: Path, axes: str, axis: int) -> None:
    values = write_array(tmp_path, (2, 6, 7, 6 if axis == 1 else 9))
    (tmp_path / "axes.json").write_text(f'"{axes}"')
    assert torch.equal(open_images(tmp_path).read(1), torch.from_numpy(np.moveaxis(values[1], axis - 1, 0)))
    with pytest.raises(UserError, match=f"channels must be {values.shape[axis]}, as in .* with the axes {axes}"):
        open_images(tmp_path, channels=values.shape[4 - axis] + 1)


@pytest.mark.parametrize("told", ['"NWHC"', "3", "not JSON", '"NHW"'])
def test_axes_that_are_none(tmp_path: Path, told: str) -> None:
    write_array(tmp_path, (2, 6, 7, 3))
    (tmp_path / "axes.json").write_text(told)
    with pytest.raises(UserError, match=r'axes.json (must hold "NHWC" or "NCHW" for the shape|cannot be read)'):
        open_images(tmp_path)


def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 383)
    image(RGB).save(tmp_path / "a.png")
    write_tiff(tmp_path, np.zeros((16, 48, 2), np.uint8), photometric="minisblack", planarconfig="contig")
    data, bands = open_images(tmp_path, channels=3), open_images(tmp_path, channels=2)
    limit = "ValueError: it must have at most 766 pixels of 32 bits; it has"
    with pytest.raises(UnreadableImage, match=f"a.png: {limit} 768 pixels"):
        data.read(0)
    with pytest.raises(UnreadableImage, match=f"a.tif: {limit} 48 x 16 pixels of 2 x 8 bits"):
        bands.read(1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.warns(Image.DecompressionBombWarning):
        assert data.read(0).shape == (3, 16, 48)
    assert bands.read(1).shape == (2, 16, 48)


def test_16_bit_grey_with_transparency_keeps_its_range(tmp_path: Path) -> None:
    """Values that differ only in the lower eight bits are stretched, as without transparency."""
    values = np.array([[[1000], [1010], [1020]]], np.uint16)
    png(np.concatenate([values, np.full_like(values, 65535)], 2))(tmp_path)
    assert open_images(tmp_path, channels=1).read(0).flatten().tolist() == [0, 128, 255]
    png(deep(np.array([[[GREY], [0], [255]]], np.uint8)))(tmp_path)
    assert open_images(tmp_path, channels=1).read(0).flatten().tolist() == [GREY, 0, 255]


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_first_of_several_frames(tmp_path: Path, name: str) -> None:
    first, second = image(RGB), image(255 - RGB)
    options: dict[str, object] = {"lossless": True} if name == "a.webp" else {}
    first.save(tmp_path / name, save_all=True, append_images=[second], **options)
    row, column = CENTRE
    assert open_images(tmp_path).read(0)[:, row, column].tolist() == pytest.approx(ORANGE, abs=3)
