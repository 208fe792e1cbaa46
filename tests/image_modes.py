"""One picture in every mode and container of docs/data.md, whose table this script writes.

The picture has three squares: black, white, and an orange one that is partly transparent if the
mode can be. Black and white give grey of many bits its whole range. Orange is compared with what
it must become by the definitions of luminance (ITU-R 601-2) and of transparency onto white.
"""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile
from image_files import encoded, write_idx, write_tar
from PIL import Image, ImageCms

SIDE = 16
ORANGE, ALPHA = (200, 100, 50), 102
CENTRE = (SIDE // 2, 2 * SIDE + SIDE // 2)
GREY = round((299 * ORANGE[0] + 587 * ORANGE[1] + 114 * ORANGE[2]) / 1000)
DOCS = Path(__file__).resolve().parent.parent / "docs" / "data.md"
START, END = "<!-- modes: written by tests/image_modes.py -->\n", "<!-- end of modes -->\n"


def squares(values: tuple[int, ...], black: int, white: int) -> np.ndarray:
    """(SIDE, 3 SIDE, S): black, white, and `values`."""
    picture = np.empty((SIDE, 3 * SIDE, len(values)), np.uint8)
    picture[:, :SIDE], picture[:, SIDE : 2 * SIDE], picture[:, 2 * SIDE :] = black, white, values
    return picture


RGB, L = squares(ORANGE, 0, 255), squares((GREY,), 0, 255)
ALPHAS = squares((ALPHA,), 255, 255)
RGBA, LA = np.concatenate([RGB, ALPHAS], 2), np.concatenate([L, ALPHAS], 2)


def deep(picture: np.ndarray) -> np.ndarray:
    return picture.astype(np.uint16) * 257


def premultiplied(picture: np.ndarray) -> np.ndarray:
    colours = np.round(picture[..., :-1].astype(float) * picture[..., -1:] / np.iinfo(picture.dtype).max).astype(picture.dtype)
    return np.concatenate([colours, picture[..., -1:]], 2)


def image(picture: np.ndarray) -> Image.Image:
    return Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)


def saved(picture: Image.Image, name: str, **options: object) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        picture.save(folder / name, **options)
        return folder

    return write


def png(picture: np.ndarray, transparent: tuple[int, ...] = (), bits: int = 0) -> Callable[[Path], Path]:
    """A PNG of a depth that Pillow does not write; `bits` below 8 take grey values of that many."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    def write(folder: Path) -> Path:
        height, width, samples = picture.shape
        depth, kind = bits or 8 * picture.itemsize, {1: 0, 2: 4, 3: 2, 4: 6}[samples]
        rows = picture.astype(picture.dtype.newbyteorder(">"))
        if bits:
            rows = (rows.reshape(height, -1, 8 // bits) << np.arange(8 - bits, -1, -bits)).sum(-1).astype(np.uint8)
        content = b"".join(b"\0" + row.tobytes() for row in rows)
        parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))]
        parts += [chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))] if transparent else []
        parts += [chunk(b"IDAT", zlib.compress(content)), chunk(b"IEND", b"")]
        (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
        return folder

    return write


def tiff(picture: np.ndarray, photometric: str, alpha: str = "", planar: str = "contig", **options: object):
    def write(folder: Path) -> Path:
        pixels = picture[..., 0] if picture.shape[-1] == 1 else picture
        given: dict[str, object] = {"extrasamples": [alpha]} if alpha else {}
        if pixels.ndim == 3:
            given["planarconfig"] = planar
            pixels = pixels.transpose(2, 0, 1) if planar == "separate" else pixels
        tifffile.imwrite(folder / "a.tif", pixels, photometric=photometric, **given, **options)
        return folder

    return write


def array(picture: np.ndarray) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        np.save(folder / "images.npy", picture[None])
        return folder

    return write


def idx(folder: Path) -> Path:
    write_idx(folder / "train-images-idx3-ubyte", L[None, ..., 0])
    return folder / "train-images-idx3-ubyte"


def tar(picture: Image.Image) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        write_tar(folder / "a.tar", {"0.png": encoded(picture, "PNG")})
        return folder

    return write


def plain_file(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder

    return write


def pnm(picture: np.ndarray) -> bytes:
    kind, (height, width, _) = {1: 5, 3: 6}[picture.shape[-1]], picture.shape
    header = f"P{kind} {width} {height} {np.iinfo(picture.dtype).max}\n".encode()
    return header + picture.astype(picture.dtype.newbyteorder(">")).tobytes()


def lab(picture: np.ndarray) -> Image.Image:
    profiles = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
    changed = ImageCms.profileToProfile(image(picture), *profiles, outputMode="LAB")
    assert changed is not None
    return changed


def with_alpha_palette() -> Image.Image:
    palette = image(RGB).quantize(8, dither=Image.Dither.NONE)
    alphas = bytearray([255] * 8)
    alphas[palette.getpixel(CENTRE[::-1])] = ALPHA
    palette.info["transparency"] = bytes(alphas)
    return palette


def inverted(picture: np.ndarray) -> np.ndarray:
    return np.iinfo(picture.dtype).max - picture


Expected = dict[int, tuple[float, ...]]  # by the number of channels


def expected(colours: tuple[int, ...], alpha: int = 255) -> Expected:
    on_white = tuple(255 - (255 - value) * alpha / 255 for value in colours)
    luminance = 0.299 * on_white[0] + 0.587 * on_white[1] + 0.114 * on_white[2]
    return {1: (luminance,), 3: on_white, 4: (*colours, alpha)}


FLOATS = L.astype(np.float32) / 255 - 3
DEEP_ORANGE = tuple(value * 257 for value in ORANGE)
CMYK = image(RGB).convert("CMYK")
CMYKS = np.asarray(CMYK)
PALETTE = image(RGB).quantize(8, dither=Image.Dither.NONE)
BILEVEL = image(L).convert("1", dither=Image.Dither.NONE)
COLOURS, COLOURS_WITH_ALPHA = expected(ORANGE), expected(ORANGE, ALPHA)
GREYS, GREYS_WITH_ALPHA = expected((GREY,) * 3), expected((GREY,) * 3, ALPHA)

# Mode -> what the orange square must become, and the containers, by what writes it there.
MEMBERS: dict[str, tuple[Expected, dict[str, Callable[[Path], Path]]]] = {
    "black and white": (
        expected((0, 0, 0)),
        {
            "PNG": saved(BILEVEL, "a.png"),
            "BMP": saved(BILEVEL, "a.bmp"),
            "TIFF": saved(BILEVEL, "a.tif"),
            "TIFF, white is zero": saved(BILEVEL, "a.tif", tiffinfo={262: 0}),
            "PBM": saved(BILEVEL, "a.pnm"),
        },
    ),
    "grey, 8 bits": (
        GREYS,
        {
            "PNG": saved(image(L), "a.png"),
            "JPEG": saved(image(L), "a.jpg", quality=100),
            "JPEG 2000": saved(image(L), "a.jp2"),
            "WebP": saved(image(L), "a.webp", lossless=True),
            "GIF": saved(image(L), "a.gif"),
            "BMP": saved(image(L), "a.bmp"),
            "PGM": plain_file("a.pgm", pnm(L)),
            "TIFF": tiff(L, "minisblack"),
            "TIFF, white is zero": tiff(inverted(L), "miniswhite"),
            "npy (N, H, W)": array(L[..., 0]),
            "npy (N, H, W, 1)": array(L),
            "idx": idx,
            "tar": tar(image(L)),
        },
    ),
    "grey, more bits": (
        GREYS,
        {
            "PNG, 16": png(deep(L)),
            "PGM, 16": plain_file("a.pgm", pnm(deep(L))),
            "TIFF, 16": tiff(deep(L), "minisblack"),
            "TIFF, 16, white is zero": tiff(inverted(deep(L)), "miniswhite"),
            "TIFF, big-endian 16": tiff(deep(L), "minisblack", byteorder=">"),
            "TIFF, signed 8": tiff((L.astype(int) - 128).astype(np.int8), "minisblack"),
            "TIFF, signed 16": tiff((deep(L).astype(int) - 32768).astype(np.int16), "minisblack"),
            "TIFF, 32": tiff(deep(L).astype(np.uint32) << 16, "minisblack"),
            "TIFF, signed 32": tiff(deep(L).astype(np.int32) * 1000, "minisblack"),
            "TIFF, float": tiff(FLOATS, "minisblack"),
            "TIFF, float, white is zero": tiff(-FLOATS, "miniswhite"),
        },
    ),
    "grey with transparency": (
        GREYS_WITH_ALPHA,
        {
            "PNG": png(LA),
            "PNG, 16": png(deep(LA)),
            "WebP": saved(image(LA), "a.webp", lossless=True, exact=True),
            "TIFF": tiff(LA, "minisblack", "unassalpha"),
            "TIFF, premultiplied": tiff(premultiplied(LA), "minisblack", "assocalpha"),
            "TIFF, 16": tiff(deep(LA), "minisblack", "unassalpha"),
            "TIFF, separate": tiff(LA, "minisblack", "unassalpha", "separate"),
        },
    ),
    "grey with a transparent value": (expected((GREY,) * 3, 0), {"PNG": png(L, (GREY,)), "PNG, 16": png(deep(L), (GREY * 257,))}),
    "palette": (
        COLOURS,
        {
            **{kind: saved(PALETTE, f"a.{kind[:3].lower()}") for kind in ("PNG", "GIF", "BMP", "TIFF")},
            "tar": tar(PALETTE),
        },
    ),
    "palette with transparency": (COLOURS_WITH_ALPHA, {"PNG": saved(with_alpha_palette(), "a.png")}),
    "colours, 8 bits": (
        COLOURS,
        {
            "PNG": saved(image(RGB), "a.png"),
            "JPEG": saved(image(RGB), "a.jpg", quality=100, subsampling=0),
            "JPEG 2000": saved(image(RGB), "a.jp2"),
            "WebP": saved(image(RGB), "a.webp", lossless=True),
            "BMP": saved(image(RGB), "a.bmp"),
            "PPM": plain_file("a.ppm", pnm(RGB)),
            "TIFF": tiff(RGB, "rgb"),
            "TIFF, separate": tiff(RGB, "rgb", planar="separate"),
            "TIFF, YCbCr": saved(image(RGB).convert("YCbCr"), "a.tif"),
            "npy (N, H, W, 3)": array(RGB),
            "npy (N, 3, H, W)": array(RGB.transpose(2, 0, 1)),
            "tar": tar(image(RGB)),
        },
    ),
    "colours, 16 bits": (
        COLOURS,
        {
            "PNG": png(deep(RGB)),
            "PPM": plain_file("a.ppm", pnm(deep(RGB))),
            "TIFF": tiff(deep(RGB), "rgb"),
            "TIFF, separate": tiff(deep(RGB), "rgb", planar="separate"),
        },
    ),
    "colours, float": (COLOURS, {"TIFF": tiff(RGB.astype(np.float32) / 255, "rgb")}),
    "colours with transparency": (
        COLOURS_WITH_ALPHA,
        {
            "PNG": saved(image(RGBA), "a.png"),
            "PNG, 16": png(deep(RGBA)),
            "JPEG 2000": saved(image(RGBA), "a.jp2"),
            "WebP": saved(image(RGBA), "a.webp", lossless=True, exact=True),
            "TIFF": tiff(RGBA, "rgb", "unassalpha"),
            "TIFF, premultiplied": tiff(premultiplied(RGBA), "rgb", "assocalpha"),
            "TIFF, separate": tiff(RGBA, "rgb", "unassalpha", "separate"),
            "TIFF, 16": tiff(deep(RGBA), "rgb", "unassalpha"),
            "tar": tar(image(RGBA)),
        },
    ),
    "a transparent colour": (expected(ORANGE, 0), {"PNG": png(RGB, ORANGE), "PNG, 16": png(deep(RGB), DEEP_ORANGE)}),
    "CMYK": (
        COLOURS,
        {
            "JPEG": saved(CMYK, "a.jpg", quality=100),
            "TIFF": saved(CMYK, "a.tif"),
            "TIFF, separate": tiff(CMYKS, "separated", planar="separate"),
            "TIFF, 16": tiff(deep(CMYKS), "separated"),
        },
    ),
    "L*a*b*": (COLOURS, {"TIFF": saved(lab(RGB), "a.tif")}),
}


def table() -> str:
    """Return the rows of docs/data.md."""
    lines = ["| mode | in | 1 channel | 3 channels | 4 channels |", "|---|---|---|---|---|"]
    for mode, (values, containers) in MEMBERS.items():
        shown = " | ".join(", ".join(str(round(value)) for value in values[channels]) for channels in (1, 3, 4))
        lines.append(f"| {mode} | {'; '.join(containers)} | {shown} |")
    return "\n".join(lines) + "\n"


def written_table() -> str:
    return DOCS.read_text().split(START)[1].split(END)[0]


if __name__ == "__main__":
    before, rest = DOCS.read_text().split(START)
    DOCS.write_text(before + START + table() + END + rest.split(END)[1])
