"""PNG and JPEG files without needless metadata, since some decoders fail on broken metadata."""

import zlib
from collections.abc import Iterator

PNG_MAGIC, JPEG_MAGIC = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
SOS = 0xDA  # start of scan: a JPEG's pixels follow
NEEDED_CHUNKS = frozenset((b"tRNS", b"eXIf"))  # beside the critical ones
NEEDED_SEGMENTS = {0xE0: (b"JFIF\0", 14), 0xE1: (b"Exif\0\0", 6), 0xEE: (b"Adobe", 12)}  # marker -> start, least length
OTHER_SEGMENTS = frozenset((*range(0xE0, 0xF0), 0xFE))  # APP0 to APP15, comments


def without_metadata(content: bytes) -> bytes | None:
    """Return the image with only its pixels and orientation; None if there is nothing to remove."""
    if content.startswith(PNG_MAGIC):
        bare = PNG_MAGIC + b"".join(_chunks(content))
    elif content.startswith(JPEG_MAGIC):
        bare = content[:2] + b"".join(_segments(content))
    else:
        return None
    return None if bare == content else bare


def _chunks(content: bytes) -> Iterator[bytes]:
    """Yield the chunks of a PNG, without ancillary ones that are not needed or are damaged."""
    at = len(PNG_MAGIC)
    while at + 12 <= len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        chunk, name = content[at:end], content[at + 4 : at + 8]
        intact = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if name[:1].isupper() or (name in NEEDED_CHUNKS and intact):
            yield chunk
        at = end
    yield content[at:]


def _segments(content: bytes) -> Iterator[bytes]:
    """Yield the needed segments of a JPEG after its first marker, then its pixels unchanged."""
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF and content[at + 1] != SOS:
        marker, end = content[at + 1], at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        start, least = NEEDED_SEGMENTS.get(marker, (b"", len(content)))
        is_needed = end - at - 4 >= least and content.startswith(start, at + 4)
        if is_needed or marker not in OTHER_SEGMENTS:
            yield content[at:end]
        at = max(end, at + 2)
    yield content[at:]
