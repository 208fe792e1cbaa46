"""The corruptions of ImageNet-C (Hendrycks, Dietterich 2019)."""

import random

import torch
from torch import Tensor

CORRUPTIONS = (  # with the names of imagecorruptions
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow", "frost"),
    *("fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
SEVERITIES = (1, 2, 3, 4, 5)
LEAST_SIDE = 32  # the least side that the library takes


def corrupted(images: Tensor, kind: str, severity: int, seed: int) -> Tensor:
    """Corrupt images (n, 1 or 3, H, W) uint8 by one of the CORRUPTIONS, severity 1 to 5.

    Sides under 32 pixels are padded with their edges first. The seed has no effect on impulse noise
    and glass blur, whose generators cannot be seeded.
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
        seen = changed[top : top + height, left : left + width, : images.shape[1]]  # the library turns grey images into colours
        out.append(torch.from_numpy(seen.copy()).permute(2, 0, 1))
    return torch.stack(out).contiguous()
