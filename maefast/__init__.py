"""maefast: Masked Autoencoder pre-training at the speed of the hardware, behind the official API."""

from . import ops
from ._version import __version__
from .dispatch import backend, explain

__all__ = ["__version__", "backend", "explain", "ops"]
