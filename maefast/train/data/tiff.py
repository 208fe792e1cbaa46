"""TIFFs that tifffile reads: any number of bands, and files that Pillow cannot read or misreads."""

import logging
from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

from .limits import check_held
from .modes import HIGH_DEPTH_MODES, MODES, PHOTOMETRIC, WHITE_IS_ZERO, stretched

if TYPE_CHECKING:
    from PIL.Image import Image

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
BITS_PER_SAMPLE, DESCRIPTION, ORIENTATION, PLANES, EXTRA_SAMPLES, SAMPLE_FORMAT = 258, 270, 274, 284, 338, 339
GREYS, RGB, SEPARATED, YCBCR = (WHITE_IS_ZERO, 1), 2, 5, 6  # values of PHOTOMETRIC
JPEGS = 6, 7  # values of a page's compression
UNSPECIFIED, PREMULTIPLIED, ALPHA = 0, 1, 2  # values of EXTRA_SAMPLES
UNSIGNED, SIGNED = 1, 2  # values of SAMPLE_FORMAT
NAMES_ITS_AXES = ("ImageJ=", "<OME", '"axes"')  # in the description


class Stored(NamedTuple):
    """The first image of a TIFF as it is stored.

    pixels       (H, W, S)
    photometric  the kind of its samples, a value of PHOTOMETRIC
    extra        the kinds of the samples beyond the colours, values of EXTRA_SAMPLES
    orientation  the value of EXIF
    """

    pixels: Any
    photometric: int
    extra: tuple[int, ...]
    orientation: int

    @property
    def colours(self) -> int:
        """Return the number of grey or colour samples; 0 for bands, which are no picture."""
        samples = self.pixels.shape[-1]
        if self.photometric in GREYS:
            return {1: 1, 3: 3}.get(samples, 1 if samples == 2 and self.alpha is not None else 0)
        known = {RGB: 3, SEPARATED: 4, YCBCR: 3}.get(self.photometric, 0)
        return known if samples >= known else 0

    @property
    def alpha(self) -> int | None:
        """Return the kind of the first sample beyond the colours if it is transparency."""
        return self.extra[0] if self.extra and self.extra[0] in (PREMULTIPLIED, ALPHA) else None

    @property
    def has_fourth_band(self) -> bool:
        """Return whether there is a band beside red, green and blue that is not transparency."""
        return self.photometric == RGB and self.pixels.shape[-1] > 3 and self.alpha is None


def is_tiff(file: str | bytes) -> bool:
    if isinstance(file, bytes):
        return file[:4] in MAGIC
    with open(file, "rb") as stream:
        return stream.read(4) in MAGIC


def is_misread(image: Any, channels: int | None) -> bool:
    """Return whether Pillow would return wrong pixels of a TIFF that it has opened.

    It does so for signed bytes, unsigned 32-bit values, separate planes of grey or of many bits, a
    second or fourth band that is no transparency, bands on pages, and some uncompressed YCbCr.
    """
    tags = image.tag_v2
    photometric, bits, kinds = tags.get(PHOTOMETRIC), _first(tags.get(BITS_PER_SAMPLE), 1), _first(tags.get(SAMPLE_FORMAT), 1)
    separate = tags.get(PLANES) == 2 and (bits != 8 or photometric in GREYS)
    is_raw_ycbcr = photometric == YCBCR and image.mode == "RGB" and image.tile[0][0] == "raw"
    if separate or is_raw_ycbcr or (kinds, bits) in ((SIGNED, 8), (UNSIGNED, 32)):
        return True
    extra = tags.get(EXTRA_SAMPLES) or ()
    if _first(extra, ALPHA) == UNSPECIFIED and (photometric in GREYS or (channels == 4 and photometric == RGB)):
        return True
    description = str(tags.get(DESCRIPTION, ""))
    grey = image.mode in HIGH_DEPTH_MODES or image.mode == "L"
    return grey and getattr(image, "n_frames", 1) > 1 and any(word in description for word in NAMES_ITS_AXES)


def _first(values: Any, default: int) -> Any:
    return values[0] if isinstance(values, tuple) and values else values if isinstance(values, int) else default


def read_tiff(file: str | bytes, channels: int | None) -> Stored:
    """Read the first image of a TIFF. Pages are bands if it says so or there are `channels`."""
    try:
        import tifffile
    except ImportError as error:
        raise ImportError('this TIFF needs tifffile, since Pillow cannot read it: pip install "maefast[train]"') from error
    if not (log := logging.getLogger("tifffile")).level:
        log.setLevel(logging.CRITICAL)  # it logs a line for each tag of a broken file
    with tifffile.TiffFile(BytesIO(file) if isinstance(file, bytes) else file) as tiff:
        page: Any = tiff.pages[0]
        series = tiff.series[0]
        orientation = page.tags.get(ORIENTATION)
        turned = orientation.value if orientation is not None and isinstance(orientation.value, int) else 1
        photometric, stored = int(page.photometric), tiff.filehandle.size
        if photometric == YCBCR and page.compression in JPEGS:
            photometric = RGB  # as tifffile gives it
        if page.axes == "YX" and "C" in series.axes:
            return Stored(_pages(series, series.axes.index("C"), stored), photometric, (), turned)
        if page.axes == "YX" and channels not in (None, *MODES) and len(series.pages) == channels:
            return Stored(_pages(series, series.shape.index(channels), stored), photometric, (), turned)
        if page.axes not in SAMPLES_LAST:
            raise ValueError(f"its page must have rows, columns and samples; it has the axes {page.axes}, {tuple(page.shape)}")
        _check_size(page.imagelength, page.imagewidth, page.samplesperpixel, page.dtype)
        check_held(page.imagelength * page.imagewidth * page.samplesperpixel, stored)
        pixels = SAMPLES_LAST[page.axes](page.asarray())
        return Stored(pixels, photometric, tuple(map(int, page.extrasamples)), turned)


SAMPLES_LAST: dict[str, Callable[[Any], Any]] = {  # by the axes of a page, as tifffile names them
    "YX": lambda pixels: pixels[..., None],
    "YXS": lambda pixels: pixels,
    "SYX": lambda pixels: pixels.transpose(1, 2, 0),
}


def _pages(series: Any, bands: int, stored: int) -> Any:
    """Return pages of one sample as (H, W, C): C is axis `bands`, other axes are taken at 0."""
    kept = [series.axes.index("Y"), series.axes.index("X"), bands]
    height, width, _ = (series.shape[axis] for axis in kept)
    _check_size(height, width, series.size // max(1, height * width), series.dtype)
    check_held(series.size, stored)
    pixels = series.asarray()
    pixels = pixels[tuple(slice(None) if axis in kept else 0 for axis in range(pixels.ndim))]
    return pixels.transpose([sorted(kept).index(axis) for axis in kept])


def _most_pixels() -> float:
    """Return the most pixels that Pillow reads: twice the number at which it warns."""
    from PIL import Image

    return float("inf") if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS


def _check_size(height: int, width: int, samples: int, dtype: Any) -> None:
    """Raise ValueError for more pixels than Pillow reads, or bytes than its largest RGBA has."""
    most = _most_pixels()
    if height * width > most or height * width * samples * (dtype.itemsize + (dtype.itemsize > 1)) > 4 * most:
        raise ValueError(too_large(f"{width} x {height} pixels of {samples} x {8 * dtype.itemsize} bits"))


def too_large(what: str) -> str:
    return f"it must have at most {_most_pixels():.0f} pixels of 32 bits; it has {what}: cut it into parts"


def as_bands(stored: Stored, channels: int) -> Any:
    """Return the samples as (H, W, channels) uint8, as `_in_8_bits` does."""
    if (found := stored.pixels.shape[-1]) != channels:
        raise ValueError(f"it must have {channels} channels; it has {found}")
    return _in_8_bits(stored.pixels, stored.photometric)


def _in_8_bits(pixels: Any, photometric: int) -> Any:
    """Return samples as uint8, bright if great, stretched together if they have another dtype."""
    inverted = photometric == WHITE_IS_ZERO
    if pixels.dtype != "uint8":
        return stretched(pixels, inverted)
    return 255 - pixels if inverted else pixels


def as_picture(stored: Stored) -> "Image":
    """Return an 8-bit Pillow image of `stored.colours` grey or colour samples and transparency."""
    import numpy as np
    from PIL import Image

    count = stored.colours
    colours = stored.pixels[..., :count]
    if colours.dtype == "uint16" and stored.photometric not in GREYS:
        colours = (colours >> 8).astype(np.uint8)
    colours = _in_8_bits(colours, stored.photometric)
    samples = [np.ascontiguousarray(colours[..., i]) for i in range(count)]
    mode = "YCbCr" if stored.photometric == YCBCR else {1: "L", 3: "RGB", 4: "CMYK"}[count]
    if mode != "YCbCr" and stored.alpha is not None and count < min(4, stored.pixels.shape[-1]):
        samples.append(np.ascontiguousarray(_alpha(stored.pixels[..., count])))
        mode += "a" if stored.alpha == PREMULTIPLIED else "A"
    premultiplied = mode.endswith("a")
    image = Image.merge(mode.upper() if premultiplied else mode, [Image.fromarray(sample) for sample in samples])
    return Image.frombytes(mode, image.size, image.tobytes()).convert(mode.upper()) if premultiplied else image


def _alpha(values: Any) -> Any:
    """Return transparency as uint8: integers scaled by their range, floats from 0..1."""
    import numpy as np

    if values.dtype.kind == "f":
        return np.nan_to_num(np.clip(values, 0, 1) * 255).round().astype(np.uint8)
    return (values >> (8 * values.dtype.itemsize - 8)).astype(np.uint8)
