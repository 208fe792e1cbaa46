"""Mutated inputs from a seed, and bombs: small files of gigabytes, pickles that run code."""

import gzip
import io
import os
import pickle
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from fuzz.originals import Original, encoded, idx, npy, pickled, saved, small_mae, tar

ODD_NUMBERS = [struct.pack("<I", n) for n in (0, 0xFFFFFFFF, 0xFFFFFF7F, 0x7FFFFFFF, 0x80, 0xFFFF0000, 1)]


def truncated(content: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    return content[: draw.randrange(len(content))]


def flipped(content: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """Up to 32 bits flipped, half of the time within the first 256 bytes."""
    changed = bytearray(content)
    end = len(changed) if draw.random() < 0.5 else min(256, len(changed))
    for _ in range(draw.randint(1, 32)):
        changed[draw.randrange(end)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def odd_numbers(content: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(min(len(changed), 1024))
        changed[at : at + 4] = draw.choice(ODD_NUMBERS)
    return bytes(changed)


def other_header(content: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    length = draw.choice((4, 8, 16, 64, 512))
    return draw.choice(others)[:length] + content[length if draw.random() < 0.5 else 0 :]


def spliced(content: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """A piece left out, doubled, or taken from another file."""
    start, length = draw.randrange(len(content)), draw.choice((1, 8, 64, 512))
    piece = draw.choice((b"", content[start : start + length] * 2, draw.choice(others)[:length]))
    return content[:start] + piece + content[start + length :]


MUTATIONS = (truncated, flipped, odd_numbers, other_header, spliced)


def cases(originals: dict[str, Original], seed: int, count: int) -> Iterator[tuple[str, Original]]:
    """`count` inputs with a name for each: the bombs, then each original in turn, mutated."""
    explosive = list(bombs().items())
    yield from ((f"bomb {name}", make()) for name, make in explosive[:count])
    names, others = list(originals), [original.files[original.target] for original in originals.values()]
    for i in range(count - len(explosive)):
        draw, name = random.Random(f"{seed} {i}"), names[i % len(names)]
        original, mutate = originals[name], draw.choice(MUTATIONS)
        content = mutate(original.files[original.target], draw, others)
        files = original.files | {original.target: content}
        yield f"{i} {name} {mutate.__name__}", Original(files, original.target, original.opened, original.channels, original.kind)


Bomb = Callable[[], Original]


def _image(name: str, content: bytes, channels: int = 3) -> Original:
    return Original({name: content}, name, channels=channels)


def _checkpoint(content: bytes) -> Original:
    return Original({"a.pth": content}, "a.pth", "a.pth", 0, "checkpoint")


def bombs() -> dict[str, Bomb]:
    return {
        "png of 60000 x 60000": lambda: _image("a.png", _png(60000, 60000)),
        "bmp of 2^31": lambda: _image("a.bmp", _patched(encoded("BMP"), 18, struct.pack("<ii", 2**31 - 1, 2**31 - 1))),
        "tiff of 2^20 x 2^20": lambda: _image("a.tif", _tiff(2**20, 2**20)),
        "tiff of 6 x 2^15 x 2^15": lambda: _image("a.tif", _tiff(2**15, 2**15, 6), 6),
        "jpeg in a list of itself": lambda: Original({"list.txt": b"list.txt\n" * 1000}, "list.txt", "list.txt"),
        "idx.gz of 4 GiB": lambda: Original({"train-images-idx3-ubyte.gz": _gzip_bomb()}, "", channels=1),
        "npy of 2^60": lambda: _image("images.npy", _npy_header((2**60, 4, 4, 3))),
        "npy of -1": lambda: _image("images.npy", _npy_header((-1, 4, 4, 3))),
        "npy of objects": lambda: _image("images.npy", npy(np.array([_Payload()], object))),
        "npy that is a zip": lambda: _image("images.npy", _zip({"a.npy": bytes(2**24)}, zipfile.ZIP_DEFLATED)),
        "npy with a deep header": lambda: _image("images.npy", _npy_text("(" * 5000)),
        "deep classes.json": lambda: Original(
            {"images.npy": npy(np.zeros((2, 4, 4, 3), np.uint8)), "classes.json": b"[" * 10**6}, "classes.json"
        ),
        "tar with a header of 2^40": lambda: Original({"a.tar": _tar_header(tarfile.XHDTYPE, 2**40)}, "a.tar", "a.tar"),
        "tar with a name of 2^33": lambda: Original({"a.tar": _tar_header(tarfile.GNUTYPE_LONGNAME, 2**33)}, "a.tar", "a.tar"),
        "tar that goes backwards": lambda: Original({"a.tar": _tar_header(tarfile.REGTYPE, -1024)}, "a.tar", "a.tar"),
        "tar of long names of long names": lambda: Original({"a.tar": _nested_names(2000)}, "a.tar", "a.tar"),
        "tar with a label of 2^36": lambda: Original({"a.tar": _tar_header(tarfile.REGTYPE, 2**36, b"a.cls")}, "a.tar", "a.tar"),
        "sparse tar of 2^40": lambda: Original({"a.tar": _tar_header(tarfile.GNUTYPE_SPARSE, 2**40)}, "a.tar", "a.tar"),
        "tar in a tar": lambda: Original({"a.tar": tar({"a.png": tar({"a.png": encoded("PNG")})})}, "a.tar", "a.tar"),
        "checkpoint that is a zip bomb": lambda: _checkpoint(_zip({"a/data.pkl": bytes(2**26)}, zipfile.ZIP_DEFLATED)),
        "checkpoint with a record of 2^31": lambda: _checkpoint(_claimed_record()),
        "checkpoint of stride 0": lambda: _checkpoint(_expanded()),
        "pickle that runs code": lambda: _checkpoint(pickle.dumps({"model": _Payload()}, 2)),
        "zip that runs code": lambda: _checkpoint(with_pickle(pickle.dumps({"model": _Payload()}, 2))),
        "bytearray of 2^33": lambda: _checkpoint(with_pickle(b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x02\x85R.")),
        "bytes of 2^31": lambda: _checkpoint(with_pickle(b"\x80\x02B\xff\xff\xff\x7f.")),
        "a deep pickle": lambda: _checkpoint(with_pickle(b"\x80\x02" + b"]" * 10**6 + b"a" * (10**6 - 1) + b".")),
        "storage of 2^40 in a pickle": lambda: _checkpoint(_claimed_storage()),
        "safetensors with a header of 2^60": lambda: _checkpoint(struct.pack("<Q", 2**60) + b"{" * 100),
        "safetensors that is deep": lambda: _checkpoint(struct.pack("<Q", 10**6) + b'{"a":' + b"[" * (10**6 - 5)),
    }


class _Payload:
    """What a hostile pickle holds: it would leave a file where it is read."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch written-by-a-pickle",)


def _patched(content: bytes, at: int, piece: bytes) -> bytes:
    return content[:at] + piece + content[at + len(piece) :]


def _png(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(2**24), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _tiff(width: int, height: int, bands: int = 1) -> bytes:
    """One strip that is not there; little endian."""
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, bands), (278, height), (279, 2**31)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


def _gzip_bomb() -> bytes:
    """An idx file whose zeros take 16 KB for each 16 MiB."""
    header = idx(np.zeros((0, 64, 64), np.uint8))
    header = header[:4] + struct.pack(">I", 2**20) + header[8:]
    return gzip.compress(header, mtime=0) + gzip.compress(bytes(2**24), mtime=0) * 256


def _npy_header(shape: tuple[int, ...]) -> bytes:
    return _npy_text(repr({"descr": "|u1", "fortran_order": False, "shape": shape}))


def _npy_text(text: str) -> bytes:
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n" + bytes(48)


def _zip(members: dict[str, bytes], compression: int) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return stream.getvalue()


def _tar_header(kind: bytes, size: int, name: bytes = b"a.png") -> bytes:
    """A member of that size as base 256, without its content; the end of an archive follows."""
    number = (size + (0 if size >= 0 else 256**12)).to_bytes(12, "big")
    number = (b"\xff" if size < 0 else b"\x80") + number[1:]
    header = bytearray(name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + number + b"0" * 11 + b"\0" + b" " * 8 + kind)
    header += b"\0" * 100 + b"ustar\x0000" + b"\0" * (512 - len(header) - 108)
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + encoded("PNG").ljust(2048, b"\0") + bytes(10240)


def _nested_names(count: int) -> bytes:
    one = _tar_header(tarfile.GNUTYPE_LONGNAME, 512)[:512] + b"a.png".ljust(512, b"\0")
    return one * count + bytes(10240)


def with_pickle(content: bytes) -> bytes:
    """torch.save's archive around another pickle."""
    return _zip({"a/data.pkl": content, "a/byteorder": b"little", "a/version": b"3\n"}, zipfile.ZIP_STORED)


def _claimed_record() -> bytes:
    content = saved(small_mae().state_dict())
    at = content.rindex(b"PK\x01\x02")  # the last entry of the directory
    return _patched(content, at + 20, struct.pack("<II", 2**31, 2**31))


def _expanded() -> bytes:
    """Positions of a grid of 10^5 x 10^5, all of which lie in one row of 32 numbers."""
    import torch

    state = small_mae().state_dict()
    return saved(state | {"pos_embed": torch.zeros(1, 1, 32).expand(1, 10**10 + 1, 32)})


def _claimed_storage() -> bytes:
    content = pickled({"model": {"cls_token": small_mae().cls_token.detach()}})
    at = content.rindex(b"K\x20")  # 32 numbers
    return content[:at] + b"\x8a\x06" + (2**40).to_bytes(6, "little") + content[at + 2 :]
