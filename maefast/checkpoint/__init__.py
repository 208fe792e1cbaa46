"""Checkpoints: every known layout of a Masked Autoencoder, read into a model, written, and converted into another."""

from .convert import LAYOUTS, convert
from .files import CheckpointError, MissingPackageError
from .load import LoadReport, from_pretrained, load, save_pretrained

__all__ = [
    "LAYOUTS",
    "CheckpointError",
    "LoadReport",
    "MissingPackageError",
    "convert",
    "from_pretrained",
    "load",
    "save_pretrained",
]
