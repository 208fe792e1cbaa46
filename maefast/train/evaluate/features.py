"""Features of a frozen encoder: loading it, computing them, writing them to a file."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import checkpoint
from ...backbone import Backbone
from ...checkpoint.architecture import encoder_arguments
from ...encoder import VisionTransformer
from ...init import sincos_positions
from ..data.crops import still
from ..data.floats import in_unit_of
from ..data.labelled import Pairs, read_batches
from ..errors import UserError, require, user_errors
from ..files import replace_file, writing

KINDS = ("cls", "mean", "all")
FORMATS = (".npy", ".parquet")


def load_encoder(path: str | Path, *, random_init: bool = False, **options: Any) -> VisionTransformer:
    """Load the encoder of a checkpoint of any layout of maefast.checkpoint.

    random_init    take only the architecture, with initial weights and sin-cos positions
    options        arguments of VisionTransformer; num_classes is 0 by default
    Raises UserError for a checkpoint without an encoder, or one that does not fit the options.
    """
    initial = dict[str, Tensor]()

    def build(**arguments: Any) -> VisionTransformer:
        encoder = VisionTransformer(**{"num_classes": 0} | encoder_arguments(arguments))
        if random_init:
            initial.update({name: tensor.clone() for name, tensor in encoder.state_dict().items()})
            initial["pos_embed"] = sincos_positions(encoder.embed_dim, encoder.patch_embed.grid_size)
        return encoder

    with user_errors(checkpoint.CheckpointError, checkpoint.MissingPackageError, OSError, ValueError):
        encoder, _ = checkpoint.from_pretrained(build, path, **{"decoder_num_heads": 1} | options)  # the decoder is not built
    if random_init:
        encoder.load_state_dict(initial)
    return encoder


def fitted(model: Backbone, images: Any, nodata: float | None = None) -> Any:
    """Return an ImageDataset as the model takes it, with the mean for missing values. Raises
    UserError if the number of channels differs, or mean and std are unknown."""
    if (channels := model.patch_embed.proj.in_channels) != images.channels:
        raise UserError(f"DATA must have {channels} channels, as the checkpoint's images have; it has {images.channels}")
    if model.mean is None:
        raise UserError(f"--mean and --std must be given for images of {channels} channels: the checkpoint does not store them")
    return in_unit_of(model, images, nodata, fill=True)


@torch.no_grad()
def pooled(encoder: VisionTransformer, imgs: Tensor, kind: str) -> Tensor:
    """Return features of imgs (N, C, H, W) after `norm`, in fp32.

    kind    "cls": class token (N, D); "mean": mean of the patch tokens (N, D); "all": (N, 1+L, D)
    """
    tokens = encoder.encode(imgs).float()
    return {"cls": lambda: tokens[:, 0], "mean": lambda: tokens[:, 1:].mean(dim=1), "all": lambda: tokens}[kind]()


def features_of(encoder: VisionTransformer, images: Any, kind: str, *, batch_size: int = 256, part: float | None = None) -> Pairs:
    """Yield `pooled` features, on the CPU, and labels of all images in order, batch by batch.
    `part` is the scale of the centred box that is read (None: crops.usual_scale)."""
    size, device = encoder.patch_embed.img_size, encoder.cls_token.device
    batches = torch.arange(len(images)).split(batch_size)
    encoder.eval()
    for imgs, labels in read_batches(images, batches, size, still(size, part)):
        yield pooled(encoder, imgs.to(device), kind).cpu(), labels


def collect(batches: Pairs) -> tuple[Tensor, Tensor]:
    """Return the features and labels of all batches."""
    features, labels = zip(*batches, strict=True)
    return torch.cat(features), torch.cat(labels)


def check_output(out: Path) -> None:
    """Raise UserError unless `out` is in a folder and of a known format that can be written."""
    if out.suffix not in FORMATS:
        raise UserError(f"OUT must end in {' or '.join(FORMATS)}; it is {out}")
    if not out.parent.is_dir() or out.is_dir():
        raise UserError(f"OUT must be a file in a folder that exists; it is {out}")
    package = "numpy" if out.suffix == ".npy" else "pyarrow"
    require(f"{out.suffix} needs", {package: package}, "eval")


def write_features(batches: Pairs, count: int, shape: tuple[int, ...], out: Path) -> None:
    """Write features (count, *shape) to `out`, completely or not at all, with one batch in memory.

    .npy        float32 (count, *shape)
    .parquet    columns `features`, lists of all tokens' features, and `label`, null for no label;
                the metadata of the schema has `shape`
    """
    check_output(out)
    with writing("OUT", out), replace_file(out) as temporary:
        (_write_npy if out.suffix == ".npy" else _write_parquet)(batches, count, shape, temporary)


def _write_npy(batches: Pairs, count: int, shape: tuple[int, ...], path: Path) -> None:
    import numpy as np

    array, done = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, *shape)), 0
    with path.open("r+b") as file:  # else a full disk ends the process with SIGBUS
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    for features, _ in batches:
        array[done : done + len(features)] = features.numpy()
        done += len(features)
    array.flush()


def _write_parquet(batches: Pairs, count: int, shape: tuple[int, ...], path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    width = torch.Size(shape).numel()
    columns = [("features", pa.list_(pa.float32(), width)), ("label", pa.int64())]
    schema = pa.schema(columns, metadata={"shape": ",".join(map(str, (count, *shape)))})
    with parquet.ParquetWriter(path, schema) as writer:
        for features, labels in batches:
            rows = pa.FixedSizeListArray.from_arrays(pa.array(features.flatten().numpy()), width)
            known = pa.array(labels.numpy(), mask=(labels < 0).numpy())
            writer.write_batch(pa.record_batch([rows, known], schema=schema))
