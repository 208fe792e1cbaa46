"""Sound inputs of every kind that `open_images` and `checkpoint.load` read, to fuzz."""

import argparse
import gzip
import io
import json
import re
import tarfile
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, features

import maefast

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
SIZES |= {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}


@dataclass(frozen=True)
class Original:
    """Files of one source.

    files       contents by name
    target      the one that is mutated
    opened      what is opened: a file of these, or "" for their folder
    channels    of images; 0 for a checkpoint
    """

    files: dict[str, bytes]
    target: str
    opened: str = ""
    channels: int = 3
    kind: str = "images"


def small_mae() -> maefast.MAE:
    torch.manual_seed(0)
    return maefast.MAE(**SIZES)


def picture(mode: str = "RGB") -> Image.Image:
    y, x = np.mgrid[0:24, 0:32]
    return Image.fromarray(np.stack([8 * x, 10 * y, 4 * (x + y)], -1).astype(np.uint8)).convert(mode)


def encoded(kind: str, mode: str = "RGB", **options: object) -> bytes:
    stream = io.BytesIO()
    picture(mode).save(stream, kind, **options)
    return stream.getvalue()


def npy(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def idx(values: np.ndarray) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + b"".join(size.to_bytes(4, "big") for size in values.shape) + values.tobytes()


def tar(members: dict[str, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.LNKTYPE, next(iter(members))
        archive.addfile(link)
    return stream.getvalue()


def saved(entries: object, **options: object) -> bytes:
    stream = io.BytesIO()
    torch.save(entries, stream, **options)
    return stream.getvalue()


def pickled(entries: dict[str, object]) -> bytes:
    """Save in torch's format before 1.6, without the addresses that it names storages by."""
    content = saved(entries, _use_new_zipfile_serialization=False)
    return re.sub(rb"(?<=X..\0\0)\d{12,16}", lambda found: b"7" * len(found[0]), content, flags=re.DOTALL)


def in_one_storage(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    flat = torch.cat([tensor.flatten() for tensor in state.values()])
    parts = flat.split([tensor.numel() for tensor in state.values()])
    return {name: part.view(tensor.shape) for part, (name, tensor) in zip(parts, state.items(), strict=True)}


def images() -> dict[str, Original]:
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "rgb.png": encoded("PNG"), "p.png": encoded("PNG", "P", transparency=3), "la.png": encoded("PNG", "LA"),
        "deep.png": encoded("PNG", "I;16"), "rgb.jpg": encoded("JPEG", exif=exif), "cmyk.jpg": encoded("JPEG", "CMYK"),
        "progressive.jpg": encoded("JPEG", progressive=True), "rgb.tif": encoded("TIFF", exif=exif),
        "lzw.tif": encoded("TIFF", compression="tiff_lzw"), "a.gif": encoded("GIF"), "a.bmp": encoded("BMP"),
        "a.tga": encoded("TGA", compression="tga_rle"), "a.ppm": encoded("PPM"), "a.pcx": encoded("PCX"), "a.sgi": encoded("SGI"),
    }  # fmt: skip
    for feature, name, kind in (("webp", "a.webp", "WEBP"), ("avif", "a.avif", "AVIF"), ("jpg_2000", "a.jp2", "JPEG2000")):
        if features.check(feature):
            files[name] = encoded(kind)
    found = {name: Original({name: content}, name) for name, content in files.items()}
    bands = np.random.default_rng(0).integers(0, 256, (20, 24, 6), np.uint8)
    found |= {f"{name} 6 bands": Original({"a.tif": content}, "a.tif", channels=6) for name, content in many_bands(bands).items()}
    found["rgba.tif"] = Original({"a.tif": encoded("TIFF", "RGBA")}, "a.tif", channels=4)
    return found


def many_bands(bands: np.ndarray) -> dict[str, bytes]:
    try:
        import tifffile
    except ImportError:
        return {}
    found = {}
    for name, options in (("contiguous", {}), ("compressed", {"compression": "zlib"}), ("big", {"bigtiff": True})):
        stream = io.BytesIO()
        tifffile.imwrite(stream, bands, photometric="minisblack", planarconfig="contig", **options)
        found[name] = stream.getvalue()
    return found


def containers() -> dict[str, Original]:
    values = np.random.default_rng(0).integers(0, 256, (4, 12, 10, 3), np.uint8)
    array = {"images.npy": npy(values), "labels.npy": npy(np.arange(4)), "sizes.npy": npy(np.full((4, 2), 20, np.int32))}
    array["classes.json"] = json.dumps(["a", "b", "c", "d"]).encode()
    members = {"a.png": encoded("PNG"), "a.cls": b"1", "b.jpg": encoded("JPEG"), "b.cls": b"0", "c/" + "long" * 30 + ".png": b"x"}
    listed = {"list.txt": b"a.png 1\nb.png 2\na.png -1\n", "a.png": encoded("PNG"), "b.png": encoded("PNG")}
    grey = {"train-images-idx3-ubyte": idx(values[..., 0]), "train-labels-idx1-ubyte": idx(np.arange(4, dtype=np.uint8))}
    packed = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in grey.items()}
    found = {name: Original(array, name) for name in array}
    found |= {name: Original(files, name, channels=1) for files in (grey, packed) for name in files}
    for name, kind in (("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT), ("ustar", tarfile.USTAR_FORMAT)):
        short = {key: content for key, content in members.items() if kind != tarfile.USTAR_FORMAT or len(key) < 100}
        found[f"{name}.tar"] = Original({"a.tar": tar(short, kind)}, "a.tar", "a.tar")
    return found | {"list": Original(listed, "list.txt", "list.txt")}


def checkpoints() -> dict[str, Original]:
    from safetensors.torch import save

    model = small_mae()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = argparse.Namespace(lr=1e-3, model="a")
    training = {"model": state, "args": options, "epoch": 3, "scaler": {}, "path": OrderedDict(a=1)}
    config = json.dumps({"model_type": "maefast", **SIZES}).encode()
    half = len(state) // 2
    parts = dict(list(state.items())[:half]), dict(list(state.items())[half:])
    names = "model-1.safetensors", "model-2.safetensors"
    index = {"weight_map": {name: file for file, part in zip(names, parts, strict=True) for name in part}}
    sharded = {file: save(part) for file, part in zip(names, parts, strict=True)}
    sharded["model.safetensors.index.json"] = json.dumps(index).encode()
    files: dict[str, tuple[dict[str, bytes], str, str]] = {
        "zip": ({"a.pth": saved(state)}, "a.pth", "a.pth"),
        "training zip": ({"a.pth": saved(training)}, "a.pth", "a.pth"),
        "pickle": ({"a.pth": pickled(training | {"model": in_one_storage(state)})}, "a.pth", "a.pth"),
        "safetensors": ({"a.safetensors": save(state)}, "a.safetensors", "a.safetensors"),
        "config.json": ({"model.safetensors": save(state), "config.json": config}, "config.json", ""),
        "index.json": (sharded, "model.safetensors.index.json", ""),
        "shard": (sharded, names[0], ""),
        "deepspeed": ({"latest": b"step1", "step1/mp_rank_00_model_states.pt": saved({"module": state})}, "latest", ""),
    }
    return {name: Original(*entry, channels=0, kind="checkpoint") for name, entry in files.items()}


def originals() -> dict[str, Original]:
    return images() | containers() | checkpoints()
