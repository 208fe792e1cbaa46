"""Timing of attention: its backends, the tiles of the native kernels, and table entries."""

import math
from collections.abc import Iterable, Iterator, Mapping

import torch

from ... import dispatch, gpu, ops, tuned
from ...ops.attention import OP as ATTENTION
from ...ops.attention import AttentionAsk
from ...testing.timing import Run
from ...tuned import Attention
from .tiles import TimedTile, time_candidates
from .timed import CHECKED, GAIN, SETS, Graph, Setting, Yardstick

# T, h, d in ViT-B, -L and -H: encoders, decoders, encoders that see all patches
SHAPES = ((50, 12, 64), (50, 16, 64), (65, 16, 80), (197, 16, 32), (257, 16, 32), (197, 12, 64), (197, 16, 64))
TIMED = tuple(kernel.backend for kernel in ATTENTION.kernels if not kernel.devices or "cuda" in kernel.devices)


def _attention_graph(shape: tuple[int, int, int], setting: Setting, most: int | None = None) -> Graph:
    """Return attention of a batch, or of `most` samples, on the eager backend."""
    (T, h, d), N = shape, setting.batch if most is None else min(most, setting.batch)
    qkv = torch.randn(N, T, 3 * h * d, device=setting.device).to(setting.half).requires_grad_()
    return Graph(lambda qkv: ops.attention(qkv, h), {"qkv": qkv}, "eager")


def time_attention(shape: tuple[int, int, int], setting: Setting) -> dict[str, float]:
    """Time forward and backward on each backend that can run `shape` and is right."""
    T, _, d = shape
    yardstick = Yardstick(_attention_graph(shape, setting, CHECKED))
    graphs = [_attention_graph(shape, setting) for _ in range(SETS)]
    runs: dict[str, Run] = {}
    for backend in TIMED:
        ask = AttentionAsk(setting.device, setting.half, T, d, queries=False)
        reason = dispatch.why_not(ATTENTION, backend, ask)
        if reason is None and not yardstick.accepts(backend):
            reason = "its results are outside the error rule"
        if reason is not None:
            print(f"attention of {T} tokens, heads {d} wide, without {backend}: {reason}")
            continue
        twins = [graph.on(backend) for graph in graphs]
        runs[backend] = lambda i, twins=twins: twins[i].results()  # type: ignore[misc]
    return setting.rotate(runs, SETS)


def candidates(direction: str, T: int, d: int, shared_memory: float = math.inf) -> tuple[dict[str, int], ...]:
    """Return the tiles to try in place of the first one, on a GPU with so many bytes of shared
    memory. Those of more than twice the tokens would waste half of their work."""
    lines = tuned.fitting_tiles(direction, d, T)
    return tuple(
        {"tile": i} for i, line in enumerate(lines) if i > 0 and line["tokens"] <= 2 * T and line["shared"] <= shared_memory
    )


def time_attention_tiles(shape: tuple[int, int, int], setting: Setting) -> Iterator[TimedTile]:
    """Yield kernel, head width, and times of the first tile of native attention ("rule") and of
    each other that is right, for forward and for backward."""
    T, _, d = shape
    ask = AttentionAsk(setting.device, setting.half, T, d, queries=False)
    if dispatch.why_not(ATTENTION, "native", ask) is not None:
        return
    yardstick = Yardstick(_attention_graph(shape, setting, CHECKED))
    graphs = [_attention_graph(shape, setting).on("native") for _ in range(SETS)]
    available = gpu.shared_memory(setting.device) if setting.device.type == "cuda" else math.inf
    for direction in ("fwd", "bwd"):
        kernel = tuned.attention_kernel(direction, d, T)
        tiles = candidates(direction, T, d, available)
        yield kernel, d, time_candidates(kernel, d, tiles, yardstick, graphs, setting)


def attention_entries(
    timed: Iterable[tuple[int, int, Mapping[str, float]]], capability: str, measured: str
) -> tuple[Attention, ...]:
    """Return the entries at least GAIN faster than the default, from rows (T, head width, times).

    An entry holds from two thirds of the measured T to the end of native attention's tile, or to
    that T. Of rows of one T and width the one that gains least counts.
    """
    rows = sorted(timed, key=lambda row: (row[1], row[0]))
    entries: list[Attention] = []
    for T, d in dict.fromkeys((T, d) for T, d, _ in rows):
        gains: dict[str, float] = {}
        for backend in TIMED:
            times = [times for row_T, row_d, times in rows if (row_T, row_d) == (T, d)]
            if all(backend in row for row in times):
                gains[backend] = min(row[tuned.DEFAULT_ATTENTION] / row[backend] for row in times)
        backend, gain = max(gains.items(), key=lambda item: item[1])
        if backend == tuned.DEFAULT_ATTENTION or gain < GAIN:
            continue
        first, last = -(-2 * T // 3), T
        if backend == "native":
            begin, last = tuned.native_range(d, T)
            first = max(first, begin)
        if entries and entries[-1].head_width == d:
            first = max(first, entries[-1].last + 1)
        entries.append(Attention(capability, d, first, last, backend, math.floor(gain * 100) / 100, measured))
    return tuple(entries)
