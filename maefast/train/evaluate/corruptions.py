"""Corruptions of images, those of ImageNet-C (Hendrycks, Dietterich 2019)."""

import random

import torch
from torch import Tensor

CORRUPTIONS = (  # by the names that imagecorruptions has
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow", "frost"),
    *("fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
SEVERITIES = (1, 2, 3, 4, 5)
LEAST_SIDE = 32  # that the library takes


def corrupted(images: Tensor, kind: str, severity: int, seed: int) -> Tensor:
    """Images (n, 1 or 3, H, W) uint8 with one of the CORRUPTIONS, severity 1 to 5.

    Images of fewer than 32 rows or columns are padded for it by their edges. The seed is of NumPy's generator; the library's
    impulse noise and glass blur draw from others, which cannot be seeded.
    """
    import numpy as np
    from imagecorruptions import corrupt

    height, width = images.shape[-2:]
    room = [max(0, LEAST_SIDE - side) for side in (height, width)]
    (top, bottom), (left, right) = ((pad // 2, pad - pad // 2) for pad in room)
    np.random.seed(random.Random(f"{seed} {kind} {severity}").getrandbits(32))  # the library draws from this generator
    out = []
    for image in images.permute(0, 2, 3, 1).numpy():
        padded = np.pad(image, ((top, bottom), (left, right), (0, 0)), mode="edge")
        changed = corrupt(np.ascontiguousarray(padded), severity=severity, corruption_name=kind)
        seen = changed[top : top + height, left : left + width, : images.shape[1]]  # of grey images the library makes colours
        out.append(torch.from_numpy(seen.copy()).permute(2, 0, 1))
    return torch.stack(out).contiguous()
