"""Timing of tiles, and table entries: of the Triton kernels, and for attention.py of its own."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ... import ops, tuned
from ...testing.timing import Run
from ...tuned import Tile
from .timed import CHECKED, GAIN, SETS, Graph, Op, Setting, Tensors, Yardstick

WIDTHS = {512: 197, 768: 50, 1024: 50, 1280: 65}  # of the residual stream -> tokens of a sample
PATCHES = {768: 16, 588: 14}  # P of three channels -> the side of a patch
IMAGE, EPS = 224, 1e-6

TimedTile = tuple[str, int, dict[str, float]]  # kernel, width, times by label

_WARPS = tuple({"num_warps": warps} for warps in (1, 2, 4, 8))
_ROWS = tuple({"ROWS": rows, "num_warps": warps} for rows, warps in ((4, 4), (8, 4), (8, 8), (16, 4), (16, 8)))
_NORM = tuple({"ROWS": rows, "num_warps": warps} for rows, warps in ((1, 2), (1, 4), (2, 4), (2, 8), (4, 4), (4, 8)))
_NORM_BWD = tuple(
    {"ROWS": rows, "num_warps": warps, "PROGRAMS": programs}
    for rows, warps in ((1, 4), (2, 4), (2, 8))
    for programs in (528, 1056, 2112)
)
_GELU_BWD = tuple(
    {"ROWS": rows, "COLS": columns, "STAGES": stages, "num_warps": 4}
    for rows, columns, stages in ((8, 128, 1), (8, 128, 3), (16, 128, 3), (4, 256, 3), (8, 256, 3))
)
# Kernel -> tiles to try in place of its rule, which keeps GROUP of masked_mse.
CANDIDATES: dict[str, tuple[dict[str, int], ...]] = {
    "gather_patches_fwd": _ROWS,
    "unshuffle_fwd": _ROWS,
    "unshuffle_bwd": _ROWS,
    "masked_mse_fwd": _WARPS,
    "masked_mse_bwd": _WARPS,
    "layer_norm_fwd": _NORM,
    "layer_norm_bwd": _NORM_BWD,
    "add_layer_norm_fwd": _NORM,
    "bias_gelu_fwd": _ROWS,
    "bias_gelu_bwd": _GELU_BWD,
}


def cases(op: str, N: int, setting: Setting) -> Iterator[tuple[int, Op, Tensors]]:
    """Yield width, op and inputs for `N` samples, with the dtypes of a step under autocast."""

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=setting.device).to(dtype).requires_grad_()

    def out(t: Tensor) -> torch.dtype:
        return t.dtype if t.dtype == torch.float64 else setting.half

    if op in ("gather_patches", "masked_mse"):
        for P, side in PATCHES.items():
            L, imgs = (IMAGE // side) ** 2, normal(N, 3, IMAGE, IMAGE).detach()
            ids, _, mask = ops.random_masking_ref(torch.rand(N, L, device=setting.device), L // 4)
            if op == "gather_patches":
                inputs = {"imgs": imgs, "ids": ids}
                yield P, lambda imgs, ids, side=side: ops.gather_patches(imgs, ids, side, dtype=out(imgs)), inputs
            else:
                inputs = {"pred": normal(N, L, P, dtype=setting.half), "imgs": imgs, "mask": mask}
                yield P, lambda side=side, **t: ops.masked_mse(**t, patch_size=side, norm_pix=True), inputs
        return
    for D, tokens in WIDTHS.items():
        x, parameters = normal(N, tokens, D, dtype=setting.half), {"weight": normal(D), "bias": normal(D)}
        if op == "unshuffle":
            L = (IMAGE // 16) ** 2
            ids = torch.rand(N, L, device=setting.device).argsort(dim=1)
            x = normal(N, 1 + L // 4, D, dtype=setting.half)
            inputs = {"x": x, "ids_restore": ids, "mask_token": normal(1, 1, D), "pos_embed": normal(1, 1 + L, D).detach()}
            yield D, ops.unshuffle, inputs
        elif op == "bias_gelu":
            hidden = (normal(*shape, dtype=setting.half) for shape in ((N, tokens, 4 * D), (4 * D,)))
            yield 4 * D, ops.bias_gelu, dict(zip(("x", "bias"), hidden, strict=True))
        elif op == "layer_norm":
            inputs = {"x": normal(N, tokens, D)} | parameters
            yield D, lambda **t: ops.layer_norm(**t, eps=EPS, dtype=out(t["x"])), inputs
        else:
            inputs = {"x": x, "residual": normal(N, tokens, D)} | parameters
            yield D, lambda **t: ops.add_layer_norm(**t, eps=EPS, dtype=out(t["x"])), inputs


def time_tiles(op: str, setting: Setting) -> Iterator[TimedTile]:
    """Yield kernel, width, and times of its rule and of each candidate that is right, by label."""
    large = cases(op, setting.batch, setting)
    for width, function, inputs in cases(op, min(CHECKED, setting.batch), setting):
        yardstick = Yardstick(Graph(function, inputs, "eager"))
        _, _, inputs = next(large)
        graphs = [Graph(function, inputs, "triton").on("triton") for _ in range(SETS)]
        for kernel in (name for name in CANDIDATES if name[:-4] == op):
            yield kernel, width, time_candidates(kernel, width, CANDIDATES[kernel], yardstick, graphs, setting)


def time_candidates(
    kernel: str,
    width: int,
    candidates: Iterable[dict[str, int]],
    yardstick: Yardstick,
    graphs: Sequence[Graph],
    setting: Setting,
) -> dict[str, float]:
    """Time a kernel of `graphs` with its own rule and each candidate that is right, by label."""
    runs = dict[str, Run]()
    for tile in ({}, *candidates):
        with tuned.trying(kernel, width, setting.device, tile):
            right = yardstick.accepts(graphs[0].backend)
        if right:
            runs[label(tile)] = run_of(graphs, kernel, width, tile, setting.device)
        else:
            print(f"{kernel} of {width} without {label(tile)}: its results are outside the error rule")
    return setting.rotate(runs, SETS)


def label(tile: Mapping[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in tile.items()) or "rule"


def run_of(graphs: Sequence[Graph], kernel: str, width: int, tile: dict[str, int], device: torch.device) -> Run:
    """Return one pass of `kernel` on input set i: a forward without a graph, or a backward."""

    def run(i: int) -> object:
        with tuned.trying(kernel, width, device, tile):
            if kernel.endswith("_bwd"):
                return graphs[i].backward()
            with torch.no_grad():
                return graphs[i].forward()

    return run


def tile_entries(timed: Iterable[TimedTile], capability: str, measured: str) -> list[Tile]:
    """Return an entry for each kernel and width whose fastest candidate gains at least GAIN over
    the rule. Of rows of one kernel and width the one where a candidate gains least counts."""
    rows = dict[tuple[str, int], list[Mapping[str, float]]]()
    for kernel, width, times in timed:
        if "rule" in times:
            rows.setdefault((kernel, width), []).append(times)
    found = []
    for (kernel, width), of_kernel in rows.items():
        right = [name for name in of_kernel[0] if all(name in times for times in of_kernel)]
        gains = {name: min(times["rule"] / times[name] for times in of_kernel) for name in right}
        fastest, gain = max(gains.items(), key=lambda item: item[1])
        if gain >= GAIN:
            tile = {name: int(value) for name, value in (part.split("=") for part in fastest.split())}
            found.append(Tile(capability, kernel, width, tile, math.floor(gain * 100) / 100, measured))
    return found
