"""Checkpoints: every known layout of a Masked Autoencoder, read into a model, written, and converted into another."""

from .convert import LAYOUTS, convert
from .files import CheckpointError, MissingPackageError
from .init import init_from
from .load import LoadReport, from_pretrained, load, save_pretrained

__all__ = [
    "LAYOUTS",
    "CheckpointError",
    "LoadReport",
    "MissingPackageError",
    "convert",
    "from_pretrained",
    "init_from",
    "load",
    "save_pretrained",
]
