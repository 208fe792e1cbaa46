"""Augmentation of labelled batches: RandAugment, erasing, mixup and cutmix."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import require

LEVELS, KORNIA_LEVELS = 10, 30  # the greatest magnitude of the flag, of kornia
GROUP = 8  # images that get the same operations
POLICY = re.compile(r"rand((-(m\d+(\.\d+)?|n\d+|mstd\d+(\.\d+)?|inc[01]))*)")
ERASED_AREA = (0.02, 1 / 3)


@dataclass(frozen=True)
class RandPolicy:
    """RandAugment (Cubuk et al. 2020): `count` operations of N(magnitude, spread) on 0 to 10."""

    magnitude: float = 9.0
    spread: float = 0.0
    count: int = 2


def rand_policy(text: str) -> RandPolicy | None:
    """Parse --aa as the official launcher does: rand-m9-mstd0.5-inc1, or none."""
    if text == "none":
        return None
    match = POLICY.fullmatch(text)
    given = dict(re.findall(r"-(mstd|m|n|inc)([\d.]+)", match[1])) if match else {}
    policy = RandPolicy(float(given.get("m", 9)), float(given.get("mstd", 0)), int(given.get("n", 2)))
    if match is None or not 0 < policy.magnitude <= LEVELS or not 1 <= policy.count <= 5:
        example = f"rand-m9-n2-mstd0.5-inc1, m <= {LEVELS} and n <= 5"
        raise argparse.ArgumentTypeError(f"must be none or like {example}; it is {text!r}")
    return policy


@dataclass(frozen=True)
class Augmentation:
    """Augmentations of a batch, with the official flags; torch's global generator draws.

    aa        RandAugment; its operations are drawn for groups of eight images
    reprob    the fraction of images in which a rectangle of 2 to 33 % gets the mean colour
    mixup     alpha of Beta(alpha, alpha), the weight of an image in a mixture (Zhang et al. 2018)
    cutmix    alpha of Beta(alpha, alpha), the area that is not replaced (Yun et al. 2019)
    0 or None: off. With mixup and cutmix, each batch gets one of them with equal probability.
    """

    aa: RandPolicy | None = None
    reprob: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __bool__(self) -> bool:
        return any((self.aa, self.reprob, self.mixup, self.cutmix))

    def check(self) -> None:
        """Raise UserError if a needed library is not installed."""
        if self.aa or self.reprob:
            require("--aa and --reprob need", {"kornia": "kornia"}, "augment")


NO_AUGMENTATION = Augmentation()


class Augment:
    """Augment images (n, C, H, W), uint8 or normalised fp32, and labels (n,) to normalised fp32 and
    probabilities (n, classes)."""

    def __init__(self, augmentation: Augmentation, model: Any, classes: int):
        self.what, self.classes = augmentation, classes
        self.mean, self.std = model.mean[:, None, None], model.std[:, None, None]
        self.erase: Any = None
        if augmentation.reprob:
            from kornia.augmentation import RandomErasing

            self.erase = RandomErasing(scale=ERASED_AREA, value=0.0, p=augmentation.reprob)

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        known, y = x.is_floating_point(), F.one_hot(y, self.classes).float()
        x = x if known else x.float() / 255
        if self.what.aa is not None:
            x = torch.cat([_rand_augmented(group, self.what.aa) for group in x.split(GROUP)])
        x = x if known else (x - self.mean) / self.std
        if self.erase is not None:
            x = self.erase(x)
        cut = self.what.cutmix > 0 and (not self.what.mixup or bool(torch.rand(()) < 0.5))
        if cut or self.what.mixup:
            alpha = torch.tensor(self.what.cutmix if cut else self.what.mixup)
            share = torch.distributions.Beta(alpha, alpha).sample().item()
            x, y = cutmix(x, y, share) if cut else mixup(x, y, share)
        return x, y


def _rand_augmented(x: Tensor, policy: RandPolicy) -> Tensor:
    """Augment images (n, C, H, W) in 0..1, all with the same operations."""
    from kornia.augmentation.auto import RandAugment
    from kornia.augmentation.auto.rand_augment.rand_augment import default_policy

    level = policy.magnitude + policy.spread * torch.randn(()).item()
    level = min(max(level, 0.0), LEVELS) / LEVELS * KORNIA_LEVELS
    operations = [entry for entry in default_policy if x.shape[1] == 3 or entry[0][0] != "color"]
    kornia: Any = RandAugment  # its magnitude is annotated as int but may be a fraction
    return kornia(policy.count, min(max(level, 0.1), KORNIA_LEVELS - 0.1), operations)(x).clamp(0, 1)


def mixup(x: Tensor, y: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Mix images, and labels, with those of the reversed batch."""
    return share * x + (1 - share) * x.flip(0), share * y + (1 - share) * y.flip(0)


def cutmix(x: Tensor, y: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Replace a rectangle of 1 - share of the area, at a random place, by the reversed batch's."""
    height, width = x.shape[-2:]
    (top, bottom), (left, right) = (_side(side, share) for side in (height, width))
    x = x.clone()
    x[..., top:bottom, left:right] = x.flip(0)[..., top:bottom, left:right]
    kept = 1 - (bottom - top) * (right - left) / (height * width)
    return x, kept * y + (1 - kept) * y.flip(0)


def _side(side: int, share: float) -> Sequence[int]:
    """Return start and end of the rectangle along one side of an image."""
    length, centre = int(side * (1 - share) ** 0.5), int(torch.randint(side, ()))
    return max(0, centre - length // 2), min(side, centre + length // 2)
