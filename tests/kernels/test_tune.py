"""What tune times of the Triton kernels: real launches, with a timer that only runs them."""

import pytest
import torch
from tritonrun import DEVICE, F16

from maefast.kernels import _norm
from maefast.kernels.tune import OTHERS, PARTS, tiles
from maefast.kernels.tune.timed import Setting


def once(runs, sets):
    for run in runs.values():
        run(sets - 1)
    return dict.fromkeys(runs, 1.0)


SETTING = Setting(once, torch.device(DEVICE), batch=1, half=F16)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(tiles, "WIDTHS", {40: 5})
    monkeypatch.setattr(tiles, "PATCHES", {768: 16})
    monkeypatch.setattr(tiles, "IMAGE", 32)
    monkeypatch.setattr(tiles, "CANDIDATES", {kernel: tiles[:1] for kernel, tiles in tiles.CANDIDATES.items()})


@pytest.mark.parametrize("op", [part for part in PARTS if part not in OTHERS])
def test_every_kernel_and_candidate_runs(op, capsys):
    timed = list(tiles.time_tiles(op, SETTING))
    assert {kernel for kernel, _, _ in timed} == {kernel for kernel in tiles.CANDIDATES if kernel[:-4] == op}
    for kernel, _, times in timed:
        assert times.keys() == {"rule", tiles.label(tiles.CANDIDATES[kernel][0])}
    assert capsys.readouterr().out == ""


def test_a_tile_with_wrong_results_is_not_timed(monkeypatch, capsys):
    """Half a row normalised."""
    monkeypatch.setitem(tiles.CANDIDATES, "layer_norm_fwd", ({"BLOCK": 32},))
    times = {kernel: times for kernel, _, times in tiles.time_tiles("layer_norm", SETTING)}
    assert times["layer_norm_fwd"].keys() == {"rule"}
    assert "layer_norm_fwd of 40 without BLOCK=32: its results are outside the error rule" in capsys.readouterr().out
    assert _norm.forward_tile("layer_norm_fwd", 40, torch.empty(0, device=DEVICE))["BLOCK"] == 64, "what was tried is gone"
