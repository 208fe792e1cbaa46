"""The examples, with few steps."""

import math
import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    """Run an example as `python examples/<name>.py` does, but for main()."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return lambda name: runpy.run_path(str(EXAMPLES / f"{name}.py"))


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


def test_psnr_and_median_by_hand(example):
    restoration = example("restoration")
    clean = torch.full((2, 3, 4, 4), 100.0)
    pictures = clean.clone()
    pictures[0, :, :2] += 10  # a mean squared error of 50
    pictures[1, :, :, 0] = 110  # and of 25
    where = torch.zeros(4, 4, dtype=torch.bool)
    where[0, 0] = True  # of 100 in both
    decibels = [10 * math.log10(255**2 / error) for error in (50, 25, 100)]
    assert restoration["psnr"](pictures, clean) == pytest.approx((decibels[0] + decibels[1]) / 2)
    assert restoration["psnr"](pictures, clean, where) == pytest.approx(decibels[2])
    outlier = torch.arange(16.0).view(1, 1, 4, 4)
    outlier[0, 0, 1, 1] = 99  # its neighbours: 0 1 2 4 6 8 9 10, and itself
    assert restoration["median_filter"](outlier)[0, 0, 1, 1] == 6


def test_a_hole_is_filled(example):
    """Laplace's equation keeps a ramp; only the hole changes, whatever stood there."""
    inpaint = example("inpaint")
    hole = inpaint["square_hole"](16)
    assert hole.sum() == 256
    assert inpaint["removed_patches"](hole).sum() == 16
    ramp = torch.arange(64.0).expand(2, 3, 64, 64)
    damaged = torch.where(hole, torch.tensor(0.0), ramp)
    torch.testing.assert_close(inpaint["smooth_filling"](damaged, hole), ramp)
    assert torch.equal(inpaint["mean_filling"](damaged, hole), torch.where(hole, ramp[0, 0][~hole].mean(), ramp))
    model = inpaint["MAE"](**inpaint["MODEL"])
    made = [inpaint["inpainted"](model, torch.where(hole, torch.tensor(grey), ramp), hole) for grey in (0.0, 200.0)]
    assert torch.equal(*made)
    assert torch.equal(made[0][:, :, ~hole], ramp[:, :, ~hole])
    with pytest.raises(ValueError, match="a multiple of 8 below 64"):
        inpaint["square_hole"](12)


def test_fine_tuning_restores(example, tmp_path):
    """A Restorer adds nothing before training, and removes noise after a few steps."""
    restoration, denoise = example("restoration"), example("denoise")
    tiles = restoration["images"].photographs(restoration["SIDE"])
    clean, noise = restoration["held_out"](tiles)[:6], denoise["noise"](40.0)
    noisy = noise(clean, torch.Generator().manual_seed(7))
    torch.manual_seed(0)
    mae = restoration["MAE"](**restoration["MODEL"])
    torch.testing.assert_close(restoration["restored"](restoration["Restorer"](mae), noisy), noisy.clamp(0, 255))
    restorer = restoration["fine_tuned"](mae, tiles, noise, steps=16, seed=0)
    pictures = {"damaged": noisy, "restored": restoration["restored"](restorer, noisy), "clean": clean}
    scores = restoration["scores"](pictures)
    assert scores["restored"] > scores["damaged"] + 0.2
    restoration["save_strip"](pictures, tmp_path / "strip.png")
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.size == (3 * 66, 3 * 66)


def test_super_resolution_starts_from_bicubic(example):
    sr = example("super_resolution")
    flat = torch.full((1, 3, 64, 64), 77.0)
    assert sr["smaller"](flat, 4).shape == (1, 3, 16, 16)
    assert torch.equal(sr["bicubic"](4)(flat, torch.Generator()), flat)
