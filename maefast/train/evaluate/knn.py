"""Weighted k-NN on frozen features (Wu et al. 2018, arXiv 1805.01978, section 3.4)."""

import torch
import torch.nn.functional as F
from torch import Tensor

K, TEMPERATURE = 20, 0.07


@torch.no_grad()
def knn_votes(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    classes: int,
    *,
    k: int = K,
    temperature: float = TEMPERATURE,
    batch_size: int = 512,
) -> Tensor:
    """Return the votes (m, classes) of the k nearest of features (n, F) for queries (m, F).

    labels    (n,) int64, 0 to classes - 1
    By cosine similarity s, each votes with exp((s - s_max) / temperature); the query's largest s is
    s_max. The paper has exp(s / temperature), in the same order but beyond the range of fp32.
    Raises ValueError unless 1 <= k <= n, temperature is positive and the shapes fit together.
    """
    if features.dim() != 2 or queries.dim() != 2 or features.shape[1] != queries.shape[1] or labels.shape != features.shape[:1]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (features, labels, queries))
        raise ValueError(f"features, labels and queries must be (n, F), (n,) and (m, F); their shapes are {shapes}")
    if not 1 <= k <= len(features):
        raise ValueError(f"k must lie in 1..{len(features)}, the number of features; it is {k}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive; it is {temperature}")
    bank = F.normalize(features, dim=1).T
    votes = queries.new_zeros(len(queries), classes)
    for rows, out in zip(queries.split(batch_size), votes.split(batch_size), strict=True):
        nearest, ids = (F.normalize(rows, dim=1) @ bank).topk(k, dim=1)
        out.scatter_add_(1, labels[ids], ((nearest - nearest[:, :1]) / temperature).exp())
    return votes
