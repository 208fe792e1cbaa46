"""`open_images` under a name of its own: scripts import it from here, whichever file of maefast.train.data defines it."""

from .data.open import open_images

__all__ = ["open_images"]
