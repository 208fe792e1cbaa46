"""What tune times of the Triton kernels: real launches, with a timer that only runs them."""

import pytest
import torch
from tritonrun import DEVICE, F16

from maefast.kernels import _norm, tune


def once(runs, sets):
    for run in runs.values():
        run(sets - 1)
    return dict.fromkeys(runs, 1.0)


SETTING = tune.Setting(once, torch.device(DEVICE), batch=1, half=F16)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(tune, "WIDTHS", {40: 5})
    monkeypatch.setattr(tune, "PATCHES", {768: 16})
    monkeypatch.setattr(tune, "IMAGE", 32)
    monkeypatch.setattr(tune, "CANDIDATES", {kernel: tiles[:1] for kernel, tiles in tune.CANDIDATES.items()})


@pytest.mark.parametrize("op", [part for part in tune.PARTS if part not in tune.OTHERS])
def test_every_kernel_and_candidate_runs(op, capsys):
    timed = list(tune.time_tiles(op, SETTING))
    assert {kernel for kernel, _, _ in timed} == {kernel for kernel in tune.CANDIDATES if kernel[:-4] == op}
    for kernel, _, times in timed:
        assert times.keys() == {"rule", tune.label(tune.CANDIDATES[kernel][0])}
    assert capsys.readouterr().out == ""


def test_a_tile_with_wrong_results_is_not_timed(monkeypatch, capsys):
    """Half a row normalised."""
    monkeypatch.setitem(tune.CANDIDATES, "layer_norm_fwd", ({"BLOCK": 32},))
    times = {kernel: times for kernel, _, times in tune.time_tiles("layer_norm", SETTING)}
    assert times["layer_norm_fwd"].keys() == {"rule"}
    assert "layer_norm_fwd of 40 without BLOCK=32: its results are outside the error rule" in capsys.readouterr().out
    assert _norm.forward_tile("layer_norm_fwd", 40, torch.empty(0, device=DEVICE))["BLOCK"] == 64, "what was tried is gone"
