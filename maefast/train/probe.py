"""The few-label probe: how far a handful of labels goes on frozen features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

SHOTS = (2, 5, 10)
DRAWS = 20
MARGIN = 0.05  # what pre-training must win by, at the fewest labels


class Encoder(Protocol):
    def encode(self, imgs: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class ProbeRow:
    """Accuracy on the held-out images of one representation at one number of labels."""

    features: str
    labels_per_class: int | None  # None = all of them
    mean: float
    std: float  # over the draws; 0 where there is only one way to draw
    draws: int


@torch.no_grad()
def patch_features(model: Encoder, images: Tensor, batch_size: int = 256) -> Tensor:
    """(N, L*D) fp32: the patch tokens of `encode()`, one after the other. images (N, C, H, W).

    On digits this beats their mean and the class token, for the pre-trained and even more for the untrained encoder (0.85 against 0.83 and
    0.83; 0.71 against 0.17 and 0.19, at 2 labels per class), so it is the harder comparison too.
    """
    return torch.cat([model.encode(batch)[:, 1:].flatten(1).float() for batch in images.split(batch_size)])


def few_label_probe(
    representations: Mapping[str, Tensor],
    labels: Tensor,
    train: Tensor,
    held_out: Tensor,
    *,
    shots: Sequence[int] = SHOTS,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[ProbeRow]:
    """Logistic regression on frozen features, with few labels and with all of them.

    representations  name -> (N, F) features; each is centred and scaled by one number, both from the images of `train` without their
                     labels (scaling every feature by its own number costs raw pixels 4 points)
    labels           (N,) int64
    train, held_out  indices of the images that labels are drawn from, and of those that accuracy is measured on
    returns          a row for each representation and each of `shots` that every class has images for, then for all labels; the
                     draws are the same for every representation
    """
    from sklearn.linear_model import LogisticRegression

    classes = labels[train].unique().tolist()
    fewest = min(int((labels[train] == c).sum()) for c in classes)
    generator = torch.Generator().manual_seed(seed)
    settings: list[tuple[int | None, list[Tensor]]] = []
    for shot in (s for s in shots if s <= fewest):
        settings.append((shot, [_draw(labels, train, classes, shot, generator) for _ in range(draws)]))
    settings.append((None, [train]))

    rows = []
    for name, features in representations.items():
        centred = features - features[train].mean(dim=0)
        scaled = (centred / centred[train].square().mean().sqrt().clamp_min(1e-12)).numpy()
        for shot, drawn in settings:
            scores = []
            for ids in drawn:
                fitted = LogisticRegression(max_iter=1000, tol=1e-3).fit(scaled[ids.numpy()], labels[ids].numpy())
                scores.append(float(fitted.score(scaled[held_out.numpy()], labels[held_out].numpy())))
            score = torch.tensor(scores, dtype=torch.float64)
            rows.append(ProbeRow(name, shot, score.mean().item(), score.std(correction=0).item(), len(drawn)))
    return rows


def _draw(labels: Tensor, train: Tensor, classes: list[int], shot: int, generator: torch.Generator) -> Tensor:
    """Indices of `shot` images of each class, at random from `train`."""
    picked = []
    for c in classes:
        ids = train[labels[train] == c]
        picked.append(ids[torch.randperm(len(ids), generator=generator)[:shot]])
    return torch.cat(picked)


def verdict(rows: Sequence[ProbeRow], pretrained: str) -> tuple[bool, str]:
    """Whether `pretrained` beats every other representation by MARGIN at the fewest labels, and a sentence that says so."""
    fewest = rows[0].labels_per_class
    at = {row.features: row.mean for row in rows if row.labels_per_class == fewest}
    best = max((name for name in at if name != pretrained), key=lambda name: at[name])
    lead = at[pretrained] - at[best]
    held = lead >= MARGIN
    labels = "all labels" if fewest is None else f"{fewest} labels per class"
    points = f"{lead * 100:+.1f} points against the {best}"
    return held, f"{'Pre-training helped' if held else 'Pre-training did not help enough'}: {points} at {labels} (asked for: +{MARGIN * 100:.0f})."


def table(rows: Sequence[ProbeRow]) -> str:
    """The rows as a Markdown table: one line per representation, one column per number of labels."""
    columns = list(dict.fromkeys(row.labels_per_class for row in rows))
    cells = {(row.features, row.labels_per_class): row for row in rows}
    names = list(dict.fromkeys(row.features for row in rows))

    def cell(row: ProbeRow) -> str:
        return f"{row.mean:.3f} ± {row.std:.3f}" if row.draws > 1 else f"{row.mean:.3f}"

    body = [["features", *("all labels" if c is None else f"{c} per class" for c in columns)]]
    body += [[name, *(cell(cells[name, c]) for c in columns)] for name in names]
    widths = [max(len(line[i]) for line in body) for i in range(len(body[0]))]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in body]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def as_records(rows: Sequence[ProbeRow]) -> list[dict[str, Any]]:
    """The rows as plain dictionaries, for JSON."""
    return [vars(row).copy() for row in rows]
