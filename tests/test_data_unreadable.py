"""Images with broken metadata are read; broken images are named and counted once in a run."""

import os
import struct
import tarfile
import zlib

import image_files
import numpy as np
import pretraining
import pytest
import torch
from PIL import Image

from maefast import cli
from maefast.train.data.decode import decode
from maefast.train.data.metadata import without_metadata
from maefast.train.data.open import open_images
from maefast.train.errors import UnreadableImage

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
EXIF = {
    "junk": b"Exif\0\0garbage!garbage!",
    "zeros": b"Exif\0\0" + b"\0" * 64,
    "header alone": b"Exif\0\0II*\0",
    "no header": b"Exif\0\0\x00\x08\x00\x02\x01\x12\x00\x03",
    "far offset": b"Exif\0\0II*\0\xff\xff\xff\xff",
    "orientation of another type": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0six\0\0\0\0\0",
    "orientation 9": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0\0\0\0\0",
    "empty": b"Exif\0\0",
}
ORIENTATION_6 = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"


def encoded(kind: str, **options: object) -> bytes:
    return image_files.encoded(Image.fromarray(PIXELS), kind, **options)


def chunk(name: bytes, body: bytes, crc: int | None = None) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body) if crc is None else crc)


def png(*before_pixels: bytes, after: bytes = b"") -> bytes:
    content = encoded("PNG")
    pixels, end = content.index(b"IDAT") - 4, content.index(b"IEND") - 4
    return content[:pixels] + b"".join(before_pixels) + content[pixels:end] + after + content[end:]


def jpeg(marker: int, body: bytes, exif: bytes = b"") -> bytes:
    content = encoded("JPEG", exif=exif)
    return content[:2] + bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body + content[2:]


def shown(content: bytes) -> torch.Tensor:
    return decode("a", content, 3, None, None)


@pytest.mark.parametrize("exif", EXIF)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_that_cannot_be_read_is_ignored(kind, exif) -> None:
    options = {"dpi": (72, 72)} if kind == "JPEG" else {}
    assert torch.equal(shown(encoded(kind, exif=EXIF[exif], **options)), shown(encoded(kind)))


TEXT_BOMB = b"key\0\0" + zlib.compress(b"a" * 2**21)  # of more text than Pillow unpacks


@pytest.mark.parametrize(
    "content",
    [
        png(chunk(b"tEXt", b"key\0text", crc=0)),
        png(chunk(b"zTXt", b"key\0\0not zlib")),
        png(chunk(b"zTXt", TEXT_BOMB)),
        png(after=chunk(b"zTXt", TEXT_BOMB)),
        png(chunk(b"iCCP", b"icc\0\0not zlib")),
        png(chunk(b"iTXt", b"key\0\1\0\0\0not zlib")),
        png(chunk(b"pHYs", b"12")),
        png(chunk(b"eXIf", b"MM\0*", crc=0)),
        png(chunk(b"acTL", b"12")),
        png(chunk(b"gAMA", b"")),
    ],
)
def test_metadata_of_png_that_cannot_be_read_is_ignored(content) -> None:
    assert torch.equal(shown(content), torch.from_numpy(PIXELS).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("marker", "body"),
    [
        (0xED, b"Photoshop 3.0\x008BIM\x04\x04\0"),
        (0xE2, b"ICC_PROFILE\0\1"),
        (0xE2, b"MPF\0garbage"),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0<broken"),
        (0xFE, b""),
        (0xE0, b"JFIF"),
        (0xEE, b"Adobe"),
    ],
)
def test_metadata_of_jpeg_that_cannot_be_read_is_ignored(marker, body) -> None:
    assert torch.equal(shown(jpeg(marker, body)), shown(encoded("JPEG")))


def test_orientation_survives_other_metadata_that_is_broken() -> None:
    upright = shown(encoded("PNG"))
    assert torch.equal(shown(png(chunk(b"eXIf", ORIENTATION_6[6:]), chunk(b"zTXt", TEXT_BOMB))), upright.rot90(-1, (1, 2)))
    jpeg_turned = jpeg(0xED, b"Photoshop 3.0\x008BIM\x04\x04\0", exif=ORIENTATION_6)
    assert torch.equal(decode("a", without_metadata(jpeg_turned), 3, None, None), shown(encoded("JPEG", exif=ORIENTATION_6)))


def test_without_metadata_knows_what_it_cannot_strip() -> None:
    assert without_metadata(encoded("BMP")) is None
    assert without_metadata(encoded("PNG")) is None
    assert without_metadata(b"\xff\xd8\xff") is None


@pytest.mark.parametrize("content", [encoded("PNG")[:200], encoded("JPEG")[:400], png(chunk(b"zTXt", TEXT_BOMB))[:400]])
def test_broken_pixels_stay_unreadable(content) -> None:
    with pytest.raises(UnreadableImage, match=r"^a: \w+"):
        shown(content)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("source", ["a.tar", "files"])
def test_a_broken_image_is_named_once_and_counted_once(tmp_path, monkeypatch, capsys, source, workers) -> None:
    """Also where each crop gives another reason, as with a JPEG that is cut off."""
    monkeypatch.chdir(tmp_path)
    large = image_files.encoded(Image.fromarray(PIXELS).resize((900, 600)), "JPEG")
    contents = {f"{i:03}.jpg": encoded("JPEG") for i in range(14)}
    contents |= {"014.jpg": b"junk", "015.jpg": large[: len(large) // 2]}
    image_files.write_tar(tmp_path / "a.tar", contents)
    (tmp_path / "files").mkdir()
    for name, content in contents.items():
        (tmp_path / "files" / name).write_bytes(content)
    options = {"batch_size": 4, "num_workers": workers, "resume": "auto"}
    for epochs in (3, 6):  # the second command goes on with the first
        assert cli.main(pretraining.flags(tmp_path / source, tmp_path / "run", **options, epochs=epochs)) == 0
    skipped = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped")]
    assert [line.split(".jpg: ")[0][-3:] for line in sorted(skipped)] == ["014", "015"]
    assert "0x" not in "".join(skipped)
    assert [record["unreadable"] for record in pretraining.records(tmp_path / "run")] == [2] * 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_tiff_of_unequal_sides(tmp_path, orientation) -> None:
    """Pillow before 11.1 tells the size of such a TIFF before it turns it."""
    Image.fromarray(PIXELS).save(tmp_path / "a.tif", exif=image_files.turned_by(orientation))
    image = torch.from_numpy(PIXELS).permute(2, 0, 1)
    turns = {1: 0, 3: 2, 6: -1, 8: 1, 2: 0, 4: 2, 5: 1, 7: -1}[orientation]
    expected = (image.flip(-1) if orientation in (2, 4, 5, 7) else image).rot90(turns, (1, 2))
    assert torch.equal(open_images(tmp_path).read(0), expected)


@pytest.mark.parametrize("name", ["a\nb.jpg", "back\\slash\\u.jpg", os.fsdecode(b"\xff.jpg"), "\x1b[31m.jpg"])
@pytest.mark.parametrize("in_tar", [False, True])
def test_names_that_no_terminal_shows(tmp_path, capsys, name, in_tar) -> None:
    (tmp_path / "files" / os.fsdecode(b"cl\xfess")).mkdir(parents=True)
    (tmp_path / "files" / os.fsdecode(b"cl\xfess") / name).write_bytes(b"junk")
    (tmp_path / "files" / "good.png").write_bytes(encoded("PNG"))
    source = tmp_path / "files"
    if in_tar:
        with tarfile.open(source := tmp_path / "a.tar", "w") as tar:
            tar.add(tmp_path / "files", "x")
    assert cli.main(["pack", str(source), str(tmp_path / "out")]) == 0
    streams = capsys.readouterr()
    skipped, packed = streams.out.splitlines()
    assert skipped.startswith(f"skipped {source}")
    assert skipped.isprintable()
    assert ".jpg: UnidentifiedImageError: cannot identify image file '" in skipped
    assert packed.endswith("unreadable images skipped: 1")
    assert streams.err.count("\n") == 1


def test_a_long_reason_is_cut() -> None:
    assert len(str(UnreadableImage("a", "why " * 1000))) < 520
