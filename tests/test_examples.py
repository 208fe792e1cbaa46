"""The examples, with few steps."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def segmentation() -> dict[str, object]:
    return runpy.run_path(str(EXAMPLES / "segmentation.py"))


def test_scores_by_hand(segmentation):
    """Four pixels of ink, of which three are found, and one of the other twelve taken for it."""
    truth = torch.zeros(1, 4, 4, dtype=torch.int64)
    truth[0, 0] = 1
    predicted = truth.clone()
    predicted[0, 0, 0], predicted[0, 3, 3] = 0, 1

    def head(features: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(predicted, 2).movedim(-1, 1)

    accuracy, mean_iou = segmentation["score"](head, torch.zeros(1, 8, 2, 2), truth)
    assert accuracy == 14 / 16
    assert mean_iou == pytest.approx((11 / 13 + 3 / 5) / 2)


def test_segmentation_learns(segmentation):
    scores = segmentation["run"](pretrain_steps=2, steps=100, labelled=32, seed=0)
    nothing = scores.pop("no ink anywhere")
    assert scores.keys() == {"untrained", "pre-trained"}
    assert all(score.mean_iou > nothing.mean_iou + 0.02 for score in scores.values())
