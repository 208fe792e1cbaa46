"""Checkpoints of Masked Autoencoders: every known layout is read, three are written."""

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
