"""The stable import path of `open_images` for scripts."""

from .data.open import open_images

__all__ = ["open_images"]
