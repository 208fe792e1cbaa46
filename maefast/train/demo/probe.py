"""The few-label probe: logistic regression on frozen features with few labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...model import MAE

SHOTS = (2, 5, 10)
DRAWS = 20
TOLERANCE = 1e-7  # of the largest component of the gradient; at 1e-8 rounding stops one fit in hundreds
FULL_FIT = 4_000_000  # images x min(images, features); beyond it a fit to all labels takes ten seconds
GRID = 4  # cells per side over which patch tokens are averaged
MARGIN = 0.05  # the lead that pre-training must have at the fewest labels


@dataclass(frozen=True)
class ProbeRow:
    """Held-out accuracy of a representation at one number of labels."""

    features: str
    labels_per_class: int | None  # None = all of them
    mean: float
    std: float  # over the draws; 0 for a single draw
    draws: int


@torch.no_grad()
def patch_features(model: MAE, images: Tensor, batch_size: int = 256) -> Tensor:
    """Return the patch tokens of images (N, C, H, W), averaged over cells: (N, D*GRID*GRID) fp32.

    On digits, with 2 labels per class, they score 0.85 pre-trained and 0.65 untrained, the mean of
    all tokens 0.83 and 0.28, the class token 0.83 and 0.32.
    """
    rows, cols = model.patch_embed.grid_size
    features = []
    for batch in images.split(batch_size):
        tokens = model.encode(batch)[:, 1:].float().transpose(1, 2)  # [N, D, L]
        cells = F.adaptive_avg_pool2d(tokens.unflatten(2, (rows, cols)), (min(GRID, rows), min(GRID, cols)))
        features.append(cells.flatten(1))
    return torch.cat(features)


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
    """Fit logistic regression to frozen features, with few labels and with all of them.

    representations  name -> (N, F) features. Each is centred, and scaled by one number, computed
                     from all images of `train`; a number per feature costs raw pixels 4 points
    labels           (N,) int64
    train, held_out  indices of the images to draw labels from, and of the images to score
    returns          a row for each representation and each of `shots` for which all classes have
                     enough images, then for all labels (within FULL_FIT), of the same draws
    """
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits  # scikit-learn depends on it

    classes = labels[train].unique().tolist()
    fewest = min(int((labels[train] == c).sum()) for c in classes)
    generator = torch.Generator().manual_seed(seed)
    settings: list[tuple[int | None, list[Tensor]]] = []
    for few in (shot for shot in shots if shot <= fewest):
        settings.append((few, [_draw(labels, train, classes, few, generator) for _ in range(draws)]))
    rank = min(len(train), max(features.shape[1] for features in representations.values()))
    if not settings or len(train) * rank <= FULL_FIT:
        settings.append((None, [train]))

    regression = LogisticRegression(solver="newton-cg", max_iter=1000, tol=TOLERANCE)
    rows = []
    # A second thread makes matrices this small slower, ten times so on a busy machine.
    with threadpool_limits(1, user_api="blas"):
        for name, features in representations.items():
            centred = features - features[train].mean(dim=0)
            scaled = (centred / centred[train].square().mean().sqrt().clamp_min(1e-12)).double()
            unseen = scaled[held_out]
            for shot, drawn in settings:
                scores = [_accuracy(regression, scaled[ids], labels[ids], unseen, labels[held_out]) for ids in drawn]
                score = torch.tensor(scores, dtype=torch.float64)
                rows.append(ProbeRow(name, shot, score.mean().item(), score.std(correction=0).item(), len(drawn)))
    return rows


def _accuracy(regression: Any, x: Tensor, y: Tensor, held_out_x: Tensor, held_out_y: Tensor) -> float:
    """Return the held-out accuracy of scikit-learn's `regression`. x, held_out_x (n or m, F) fp64.

    The tolerance must be tight, since it bounds only the largest component of the gradient. At
    1e-3, pixels of 64 x 64 images scored 0.19 instead of 0.38.
    """
    if x.shape[1] > x.shape[0]:  # the solution lies in the span of x, so n dimensions are enough
        basis = torch.linalg.qr(x.T).Q  # [F, n]
        x, held_out_x = x @ basis, held_out_x @ basis
    fitted = regression.fit(x.numpy(), y.numpy())
    return float(fitted.score(held_out_x.numpy(), held_out_y.numpy()))


def _draw(labels: Tensor, train: Tensor, classes: list[int], shot: int, generator: torch.Generator) -> Tensor:
    """Draw the indices of `shot` images of each class from `train`."""
    of_class = [train[labels[train] == c] for c in classes]
    return torch.cat([ids[torch.randperm(len(ids), generator=generator)[:shot]] for ids in of_class])


def verdict(rows: Sequence[ProbeRow], pretrained: str) -> tuple[bool, str]:
    """Return whether `pretrained` leads by MARGIN at the fewest labels, and a sentence about it."""
    fewest = rows[0].labels_per_class
    at = {row.features: row.mean for row in rows if row.labels_per_class == fewest}
    best = max((name for name in at if name != pretrained), key=lambda name: at[name])
    held = (lead := at[pretrained] - at[best]) >= MARGIN
    labels = "all labels" if fewest is None else f"{fewest} labels per class"
    points = f"{lead * 100:+.1f} points against the {best} at {labels} (required: {MARGIN * 100:+.0f})"
    return held, f"{'Pre-training helped' if held else 'Pre-training did not help enough'}: {points}."


def table(rows: Sequence[ProbeRow]) -> str:
    """Return a Markdown table with a line per representation and a column per number of labels."""
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
