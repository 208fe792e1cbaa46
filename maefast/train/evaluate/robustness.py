"""`maefast robustness`: the accuracy of a classifier on corrupted images and on other folders."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.crops import still
from ..data.labelled import Pairs, read_batches
from ..device import find_device
from ..errors import UserError, user_errors
from ..files import replace_file, writing
from ..values import nearest
from .classifier import Classifier, load_classifier
from .corruptions import CORRUPTIONS, SEVERITIES, corrupted
from .features import fitted


@dataclass(frozen=True, kw_only=True)
class Check:
    """The images that a classifier is scored on."""

    data: Path | None = None  # images of its classes, clean and corrupted
    eval_split: str = "val"
    kinds: tuple[str, ...] = CORRUPTIONS
    severities: tuple[int, ...] = SEVERITIES
    count: int | None = None  # the number of images of `data`, evenly spaced; None: all
    folder: Path | None = None  # more images
    class_map: Path | None = None  # maps names of `folder` to classes; None: the names are equal
    nodata: float | None = None  # the missing value of float arrays
    seed: int = 0
    device: str = "cpu"
    batch_size: int = 256


def robustness(path: Path, check: Check, out: Path | None = None) -> dict[str, Any]:
    """Print a table of accuracies, write them to `out` as JSON, and return them.

    returns    clean (of `data`), corrupted (kind -> severity -> accuracy), mean_corrupted, folder,
               and the numbers of images
    Raises UserError, before anything is written, for a checkpoint or images that do not fit.
    """
    if check.data is None and check.folder is None:
        raise UserError("DATA or --folder must be given; neither is")
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--out must be a file in a folder that exists; it is {out}")
    if check.class_map is not None and check.folder is None:
        raise UserError("--class_map must be given together with --folder, whose classes it maps")
    if check.data is not None and check.kinds and find_spec("imagecorruptions") is None:
        raise UserError('robustness needs imagecorruptions: pip install "maefast[robustness]", or --kinds none')
    classifier = load_classifier(path)
    classifier.model.to(find_device(check.device))
    sets = {name: _opened(classifier, check, name) for name in ("data", "folder") if getattr(check, name) is not None}
    result: dict[str, Any] = {}
    if "data" in sets:
        result |= _on_corrupted(classifier, check, *sets["data"])
    if "folder" in sets:
        images, labels = sets["folder"]
        batches = _read(classifier, images, labels, range(len(images)), check)
        result |= {"folder": _score(classifier, batches, labels.unique()), "folder_images": len(images)}
    print(_table(result))
    if out is not None:
        with writing("--out", out), replace_file(out) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")
    return result


def _opened(classifier: Classifier, check: Check, name: str) -> tuple[Any, Tensor]:
    """Return the images, and the index of each one's class in the classifier."""
    from ..data.open import open_images, tell

    path = getattr(check, name)
    split = check.eval_split if name == "data" and not path.is_file() else None
    images = fitted(classifier.model, open_images(path, split, classifier.model.patch_embed.proj.in_channels), check.nodata)
    if check.data is path and check.kinds and images.channels not in (1, 3):
        raise UserError(f"--kinds must be none for a classifier of {images.channels} channels: corruptions need 1 or 3")
    if check.data is path and check.kinds and images.dtype != torch.uint8:
        raise UserError(f"--kinds must be none for float images: corruptions need uint8; {path} holds floats")
    if not images.classes or (images.labels < 0).any():
        raise UserError(f"{path} must have a label for every image")
    names = images.classes
    if name == "folder" and check.class_map is not None:
        known = _read_map(check.class_map)
        if missing := [its for its in names if its not in known]:
            raise UserError(f"--class_map must have a line for each folder; {check.class_map} has none for {missing[0]!r}")
        names = tuple(known[its] for its in names)
    ours = {its: number for number, its in enumerate(classifier.classes)}
    if strange := [its for its in names if its not in ours]:
        hint = nearest(strange[0], classifier.classes) if len(ours) < 50 else "--class_map can name its class"
        raise UserError(f"{path} must have only classes of the classifier; it has {strange[0]!r}: {hint}")
    tell(images)
    return images, torch.tensor([ours[its] for its in names])[images.labels]


def _read_map(path: Path) -> dict[str, str]:
    """Return the class of each folder, from lines of a folder's name and a class."""
    with user_errors(OSError, UnicodeDecodeError, prefix=f"--class_map must be a text file; {path} cannot be read: "):
        rows = [line.split(maxsplit=1) for line in path.read_text().splitlines() if line.strip()]
    if bad := next((number for number, row in enumerate(rows, 1) if len(row) != 2), None):
        raise UserError(f"--class_map must have a folder and its class in each line; line {bad} of {path} has one word")
    return {folder: its.strip() for folder, its in rows}


def _read(classifier: Classifier, images: Any, labels: Tensor, chosen: Sequence[int], check: Check) -> Pairs:
    """Yield images (n, C, H, W) uint8 and labels (n,) of the classifier, batch by batch."""
    size, ids = classifier.model.patch_embed.img_size, torch.tensor(chosen).split(check.batch_size)
    for part, (pixels, _) in zip(ids, read_batches(images, ids, size, still(size, classifier.crop_pct)), strict=True):
        yield pixels, labels[part]


@torch.no_grad()
def _score(classifier: Classifier, batches: Pairs, among: Tensor | None = None) -> float:
    """Return the accuracy. among: the only classes that may be predicted; None: all."""
    device, right, count = classifier.model.cls_token.device, 0, 0
    for pixels, labels in batches:
        logits = classifier.model(pixels.to(device)).float().cpu()
        if among is not None:
            others = torch.ones(len(classifier.classes), dtype=torch.bool)
            others[among] = False
            logits[:, others] = -torch.inf
        right, count = right + int((logits.argmax(dim=1) == labels).sum()), count + len(labels)
    return right / count


def _on_corrupted(classifier: Classifier, check: Check, images: Any, labels: Tensor) -> dict[str, Any]:
    chosen = torch.linspace(0, len(images) - 1, min(check.count or len(images), len(images))).long().tolist()
    clean = list(_read(classifier, images, labels, chosen, check))
    result: dict[str, Any] = {"images": len(chosen), "clean": _score(classifier, iter(clean)), "corrupted": {}}
    for kind in check.kinds:
        result["corrupted"][kind] = {
            severity: _score(classifier, ((corrupted(x, kind, severity, check.seed), y) for x, y in clean))
            for severity in check.severities
        }
    scores = [score for row in result["corrupted"].values() for score in row.values()]
    return result | ({"mean_corrupted": sum(scores) / len(scores)} if scores else {})


def _table(result: dict[str, Any]) -> str:
    """Return the accuracies as Markdown."""
    lines = list[str]()
    if "clean" in result:
        lines.append(f"clean: {result['clean']:.4f} of {result['images']} images")
    if rows := result.get("corrupted"):
        severities = list(next(iter(rows.values())))
        head = " | ".join(map(str, severities))
        lines += ["", f"| corruption | {head} | mean |", "|---|" + "---|" * (len(severities) + 1)]
        for kind, row in rows.items():
            scores = [*row.values(), sum(row.values()) / len(row)]
            lines.append(f"| {kind} | " + " | ".join(f"{score:.4f}" for score in scores) + " |")
        lines += ["", f"mean of all corruptions: {result['mean_corrupted']:.4f}"]
    if "folder" in result:
        lines.append(f"folder: {result['folder']:.4f} of {result['folder_images']} images")
    return "\n".join(lines)
