"""Images for the demo, in memory as uint8: scikit-learn's digits and photographs, or a folder."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ..data.crops import centre_square
from ..data.open import folder_images, tell
from ..data.splits import stratified_split
from ..errors import UserError


@dataclass(frozen=True)
class ImageSet:
    """Images of one size, split into those to train on and those held out."""

    images: Tensor  # (N, C, S, S) uint8; S is the model's side, or more where training crops at random
    train: Tensor  # (n,) int64, indices of the images to train on
    held_out: Tensor  # (m,) int64, the others
    labels: Tensor | None = None  # (N,) int64, -1 where there is none
    classes: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()  # (path, why) of each unreadable file


def digits(seed: int) -> ImageSet:
    """Load scikit-learn's handwritten digits, (1797, 1, 8, 8), in 10 classes; hold out a third."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images / 16.0 * 255.0).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(bunch.target).long()
    train, held_out = stratified_split(labels, 1 / 3, seed)
    return ImageSet(images, train, held_out, labels, tuple(str(name) for name in bunch.target_names))


# The held-out band of each photograph, as fractions of its width.
HELD_OUT_BANDS = {"china.jpg": (0.32, 0.55), "flower.jpg": (0.48, 0.71)}


def photographs(side: int) -> ImageSet:
    """Cut scikit-learn's two photographs into overlapping tiles (N, 3, side, side) at three scales.
    Held-out tiles lie within a band of each photograph, training tiles outside it."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    train, held_out = list[Tensor](), list[Tensor]()
    bunch = load_sample_images()
    for name, pixels in zip(bunch.filenames, bunch.images, strict=True):
        photo = Image.fromarray(pixels)
        for scale in (0.7, 0.5, 0.4):
            width, height = round(photo.width * scale), round(photo.height * scale)
            resized = np.array(photo.resize((width, height), Image.Resampling.BICUBIC))
            picture = torch.from_numpy(resized).permute(2, 0, 1)
            left, right = (round(edge * width) for edge in HELD_OUT_BANDS[Path(name).name])
            train += _tiles(picture[:, :, :left], side) + _tiles(picture[:, :, right:], side)
            held_out += _tiles(picture[:, :, left:right], side)
    order = torch.arange(len(train) + len(held_out))
    return ImageSet(torch.stack(train + held_out), order[: len(train)], order[len(train) :])


def _tiles(picture: Tensor, side: int) -> list[Tensor]:
    """Return all tiles (C, side, side) of a picture (C, H, W), a sixteenth of their side apart."""
    (_, height, width), stride = picture.shape, max(1, side // 16)
    rows, cols = range(0, height - side + 1, stride), range(0, width - side + 1, stride)
    return [picture[:, r : r + side, c : c + side] for r in rows for c in cols]


def image_folder(root: Path, side: int, seed: int, *, limit: int = 4000, exclude: Path | None = None) -> ImageSet:
    """Load at most `limit` random images below `root` as (N, 3, side, side); hold out a fifth.
    Unreadable files are skipped and listed. Raises UserError if fewer than two can be read."""
    data = folder_images(root, channels=3, exclude=exclude)
    shuffled = iter(torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist())
    images, kept = list[Tensor](), list[int]()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while len(images) < limit and (chunk := list(islice(shuffled, min(256, limit - len(images))))):
            for index, image in zip(chunk, pool.map(lambda i: data.try_read(i, (side, side), centre_square), chunk), strict=True):
                if image is not None:
                    images.append(image)
                    kept.append(index)
    skipped = [(error.path, error.why) for error in data.skipped.values()]
    if len(images) < 2:
        what = f"{len(images)} of {len(data)} files could be read"
        why = "".join(f"; {path}: {reason}" for path, reason in skipped[:3])
        raise UserError(f"{root} must hold at least two readable images, one of them to hold out; {what}{why}")
    tell(data)
    labels = data.labels[kept]
    train, held_out = stratified_split(labels, 1 / 5, seed)
    return ImageSet(torch.stack(images), train, held_out, labels, data.classes, tuple(sorted(skipped)))


def enough_per_class(data: ImageSet, labelled: int) -> ImageSet | None:
    """Return `data` with only the classes that have `labelled` training images and a held-out one;
    None if fewer than two classes are left."""
    if data.labels is None:
        return None
    bins = len(data.classes) + 1
    train, held_out = (torch.bincount(data.labels[ids] + 1, minlength=bins)[1:] for ids in (data.train, data.held_out))
    large = ((train >= labelled) & (held_out >= 1)).nonzero().flatten()
    if len(large) < 2:
        return None
    index = torch.full((bins,), -1)
    index[large] = torch.arange(len(large))
    labels = index[data.labels]  # the label -1 reads the last entry, which is -1
    ids = [part[labels[part] >= 0] for part in (data.train, data.held_out)]
    classes = tuple(data.classes[i] for i in large.tolist())
    return replace(data, labels=labels, classes=classes, train=ids[0], held_out=ids[1])


def batches(data: ImageSet, side: int, batch_size: int, generator: torch.Generator, flip: bool) -> Iterator[Tensor]:
    """Yield endless batches (batch_size, C, side, side) of training images in random order, cropped
    at random if larger, and mirrored at random if `flip`."""
    queue = torch.empty(0, dtype=torch.int64)
    while True:
        while len(queue) < batch_size:
            queue = torch.cat([queue, data.train[torch.randperm(len(data.train), generator=generator)]])
        ids, queue = queue[:batch_size], queue[batch_size:]
        batch = data.images[ids]
        if batch.shape[-1] > side:
            offsets = torch.randint(batch.shape[-1] - side + 1, (batch_size, 2), generator=generator).tolist()
            pairs = zip(batch, offsets, strict=True)
            batch = torch.stack([image[:, r : r + side, c : c + side] for image, (r, c) in pairs])
        if flip:
            mirrored = torch.rand(batch_size, generator=generator) < 0.5
            batch = torch.where(mirrored[:, None, None, None], batch.flip(-1), batch)
        yield batch


def centre_crops(images: Tensor, side: int) -> Tensor:
    """Crop the centre of images: (N, C, S, S) -> (N, C, side, side)."""
    start = (images.shape[-1] - side) // 2
    return images[..., start : start + side, start : start + side]
