"""Times attention backends and Triton's tiles on this GPU and rewrites the table tuned.json.

    python -m maefast.kernels.tune [--only attention,layer_norm] [--output FILE]

A few minutes. Whatever is timed is first held against float64. An entry stays where its backend is
not installed here.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch, gemm, gpu, kernels, ops, request, tuned
from ..ops.attention import OP as ATTENTION
from ..ops.attention import AttentionAsk
from ..testing.errors import breach
from ..testing.timing import Budget, CudaTimer, Run, rotate
from ..tuned import Attention, Table, Tile
from . import _products, _repeated

# T, h, d in ViT-B, -L and -H: encoders, decoders, encoders that see all patches
SHAPES = ((50, 12, 64), (50, 16, 64), (65, 16, 80), (197, 16, 32), (257, 16, 32), (197, 12, 64), (197, 16, 64))
WIDTHS = {512: 197, 768: 50, 1024: 50, 1280: 65}  # of the residual stream -> tokens of a sample
PATCHES = {768: 16, 588: 14}  # P of three channels -> the side of a patch
IMAGE, EPS = 224, 1e-6
GAIN = 1.05  # what a choice must gain over the default: less is noise
SETS = 2  # of inputs, that rotate
ROUNDS = 15
CHECKED = 8  # samples that are held against float64

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
# Kernel and head width -> tiles to try. Those for more than twice the tokens waste half their work.
ATTENTION_TILES: dict[tuple[str, int], tuple[dict[str, int], ...]] = {
    (tuned.attention_kernel(direction, d, T), d): tuple(
        {"tile": i} for i, line in enumerate(tuned.fitting_tiles(direction, d, T)) if i > 0 and line["tokens"] <= 2 * T
    )
    for T, _, d in SHAPES
    for direction in ("fwd", "bwd")
}
TIMED = tuple(kernel.backend for kernel in ATTENTION.kernels if not kernel.devices or "cuda" in kernel.devices)
OTHERS = ("attention", "gemm", "repeated_tokens")  # beside the ops whose Triton tiles are timed
PARTS = (*OTHERS, *sorted({kernel[:-4] for kernel in CANDIDATES}))

Tensors = dict[str, Tensor]
Op = Callable[..., Tensor | tuple[Tensor, ...]]
Rotate = Callable[[Mapping[str, Run], int], dict[str, float]]  # runs, sets of inputs -> times


class Setting(NamedTuple):
    """The device and the inputs of all timings."""

    rotate: Rotate
    device: torch.device
    batch: int = 256
    half: torch.dtype = torch.bfloat16


class Graph:
    """An op on a backend and on inputs of its own: forward, and backward as often as asked."""

    def __init__(self, op: Op, inputs: Tensors, backend: str):
        self.op, self.inputs, self.backend = op, inputs, backend
        self.leaves = [tensor for tensor in inputs.values() if tensor.requires_grad]
        self.outputs = self.forward()
        self.incoming = [torch.randn(out.shape, device=out.device).to(out.dtype) for out in self.outputs]

    def forward(self) -> tuple[Tensor, ...]:
        with request.backend(self.backend):
            out = self.op(**self.inputs)
        return out if isinstance(out, tuple) else (out,)

    def backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.outputs, self.leaves, self.incoming, retain_graph=True)

    def results(self) -> list[Tensor]:
        """Compute outputs and gradients again and return them."""
        self.outputs = self.forward()
        return [out.detach() for out in self.outputs] + (list(self.backward()) if self.leaves else [])

    def on(self, backend: str, dtype: torch.dtype | None = None) -> "Graph":
        """Return the op on another backend, on these inputs and incoming gradients, in `dtype`."""

        def cast(name: str, t: Tensor) -> Tensor:
            wanted = t.dtype if dtype is None or name == "mask" or not t.is_floating_point() else dtype
            return t.detach().to(wanted).requires_grad_(t.requires_grad)

        twin = Graph(self.op, {name: cast(name, t) for name, t in self.inputs.items()}, backend)
        twin.incoming = [grad.to(out.dtype) for grad, out in zip(self.incoming, twin.outputs, strict=True)]
        return twin


def is_right(got: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor]) -> bool:
    return all(breach(*results) is None for results in zip(got, eager, exact, strict=True))


# attention


def _attention_graph(shape: tuple[int, int, int], setting: Setting, most: int | None = None) -> Graph:
    """Return attention of a batch, or of `most` samples, on the eager backend."""
    (T, h, d), N = shape, setting.batch if most is None else min(most, setting.batch)
    qkv = torch.randn(N, T, 3 * h * d, device=setting.device).to(setting.half).requires_grad_()
    return Graph(lambda qkv: ops.attention(qkv, h), {"qkv": qkv}, "eager")


def time_attention(shape: tuple[int, int, int], setting: Setting) -> dict[str, float]:
    """Time forward and backward on each backend that can run `shape` and is right."""
    T, _, d = shape
    checked = _attention_graph(shape, setting, CHECKED)
    eager, exact = checked.results(), checked.on("eager", torch.float64).results()
    graphs = [_attention_graph(shape, setting) for _ in range(SETS)]
    runs: dict[str, Run] = {}
    for backend in TIMED:
        ask = AttentionAsk(setting.device, setting.half, T, d, queries=False)
        reason = dispatch.why_not(ATTENTION, backend, ask)
        if reason is None and not is_right(checked.on(backend).results(), eager, exact):
            reason = "its results are outside the error rule"
        if reason is not None:
            print(f"attention of {T} tokens, heads {d} wide, without {backend}: {reason}")
            continue
        twins = [graph.on(backend) for graph in graphs]
        runs[backend] = lambda i, twins=twins: twins[i].results()  # type: ignore[misc]
    return setting.rotate(runs, SETS)


def time_attention_tiles(shape: tuple[int, int, int], setting: Setting) -> Iterator[tuple[str, int, dict[str, float]]]:
    """Yield kernel, head width, and times of the first tile of native attention ("rule") and of
    each other that is right, for forward and for backward."""
    T, _, d = shape
    ask = AttentionAsk(setting.device, setting.half, T, d, queries=False)
    if dispatch.why_not(ATTENTION, "native", ask) is not None:
        return
    checked, graphs = _attention_graph(shape, setting, CHECKED), [_attention_graph(shape, setting) for _ in range(SETS)]
    available = gpu.shared_memory(setting.device) if setting.device.type == "cuda" else math.inf
    for direction in ("fwd", "bwd"):
        kernel, lines = tuned.attention_kernel(direction, d, T), tuned.fitting_tiles(direction, d, T)
        tiles = [tile for tile in ATTENTION_TILES[kernel, d] if lines[tile["tile"]]["shared"] <= available]
        yield kernel, d, _time_tiles(kernel, d, [{}, *tiles], checked, graphs, "native", setting)


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


# the decoder's first block


def time_repeated(size: _repeated.Size, setting: Setting) -> dict[str, float]:
    """Time forward and backward with each mask token computed, and with each distinct one once if
    that is right."""

    def graph(N: int, mask_tokens: str, backend: str) -> Graph:
        block = _repeated.first_block(size, setting.device, setting.half, mask_tokens)
        return Graph(block, _repeated.inputs(size, N, setting.device, setting.half), backend)

    checked = graph(min(CHECKED, setting.batch), _repeated.ONCE, "auto")
    eager, exact = checked.on("eager").results(), checked.on("eager", torch.float64).results()
    contenders = [_repeated.EACH]
    if is_right(checked.results(), eager, exact):
        contenders.append(_repeated.ONCE)
    else:
        print("the decoder's first block without repeated tokens computed once: its results are outside the error rule")
    graphs = {name: [graph(setting.batch, name, "auto") for _ in range(SETS)] for name in contenders}
    return setting.rotate({name: lambda i, twins=twins: twins[i].results() for name, twins in graphs.items()}, SETS)  # type: ignore[misc]


# tiles of the Triton kernels


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


def time_tiles(op: str, setting: Setting) -> Iterator[tuple[str, int, dict[str, float]]]:
    """Yield kernel, width, and times of its rule and of each candidate that is right, by label."""
    large = cases(op, setting.batch, setting)
    for width, function, inputs in cases(op, min(CHECKED, setting.batch), setting):
        checked = Graph(function, inputs, "eager")
        _, _, inputs = next(large)
        graphs = [Graph(function, inputs, "triton") for _ in range(SETS)]
        for kernel in (name for name in CANDIDATES if name[:-4] == op):
            yield kernel, width, _time_tiles(kernel, width, ({}, *CANDIDATES[kernel]), checked, graphs, "triton", setting)


def _time_tiles(
    kernel: str,
    width: int,
    tiles: Sequence[dict[str, int]],
    checked: Graph,
    graphs: Sequence[Graph],
    backend: str,
    setting: Setting,
) -> dict[str, float]:
    """Time `kernel` on twins of `graphs`, with each tile that is right on `checked`, by label."""
    eager, exact = checked.results(), checked.on("eager", torch.float64).results()
    twins, runs = [graph.on(backend) for graph in graphs], dict[str, Run]()
    for tile in tiles:
        with tuned.trying(kernel, width, setting.device, tile):
            right = is_right(checked.on(backend).results(), eager, exact)
        if right:
            runs[label(tile)] = run_of(twins, kernel, width, tile, setting.device)
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


def tile_entry(kernel: str, width: int, times: Mapping[str, float], capability: str, measured: str) -> Tile | None:
    """Return the fastest candidate if it gains enough over the rule."""
    if "rule" not in times:
        return None
    fastest = min(times, key=lambda name: times[name])
    gain = times["rule"] / times[fastest]
    if fastest == "rule" or gain < GAIN:
        return None
    tile = next(tile for tile in candidates(kernel, width) if label(tile) == fastest)
    return Tile(capability, kernel, width, tile, math.floor(gain * 100) / 100, measured)


def candidates(kernel: str, width: int) -> tuple[dict[str, int], ...]:
    return ATTENTION_TILES[kernel, width] if (kernel, width) in ATTENTION_TILES else CANDIDATES[kernel]


def slowest(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return for each label in all rows the time in the row where it gains least over the rule."""
    relative = [{label: time / times["rule"] for label, time in times.items()} for times in rows if "rule" in times]
    labels = set[str]().union(*relative)
    return {label: max(times[label] for times in relative) for label in labels if all(label in times for times in relative)}


def medians_on(device: torch.device) -> Rotate:
    """Return a rotation that gives medians in seconds."""
    timer = CudaTimer(device)

    def medians(runs: Mapping[str, Run], sets: int) -> dict[str, float]:
        samples = rotate(runs, timer, Budget(seconds=0, least=ROUNDS, most=ROUNDS), sets)
        return {name: statistics.median(values) for name, values in samples.items()}

    return medians


# the table


def tuned_table(parts: Sequence[str], old: Table, setting: Setting, capability: str, measured: str) -> Table:
    """Return `old` with new entries of this architecture for `parts`; entries of a backend that
    could not be timed stay, and none replaces them."""
    attention, tiles, products, repeated = list(old.attention), list(old.tiles), list(old.gemm), old.repeated
    if "attention" in parts:
        timed = [(T, d, time_attention((T, h, d), setting)) for T, h, d in SHAPES]
        backends = {backend for _, _, times in timed for backend in times}
        attention = [e for e in old.attention if e.capability != capability or e.backend not in backends]
        kept = [e for e in attention if e.capability == capability]
        for entry in attention_entries(timed, capability, measured):
            if not any(e.head_width == entry.head_width and e.first <= entry.last and entry.first <= e.last for e in kept):
                attention.append(entry)
        timed_tiles = [row for shape in SHAPES for row in time_attention_tiles(shape, setting)]
        for kernel, width in dict.fromkeys((kernel, width) for kernel, width, _ in timed_tiles):
            tiles = [e for e in tiles if (e.capability, e.kernel, e.width) != (capability, kernel, width)]
            times = slowest(times for row, row_width, times in timed_tiles if (row, row_width) == (kernel, width))
            entry_of_tile = tile_entry(kernel, width, times, capability, measured)
            tiles += [] if entry_of_tile is None else [entry_of_tile]
    if "gemm" in parts:
        timed_products = [
            (kind, size, _products.time_product(kind, size, setting.device, setting.half, setting.rotate, is_right))
            for kind in gemm.KINDS
            for size in _products.sizes(kind)
        ]
        kinds = {kind for kind, _, times in timed_products if times}
        products = [e for e in old.gemm if e.capability != capability or e.kind not in kinds]
        products += _products.entries(timed_products, GAIN, capability, measured)
    if "repeated_tokens" in parts:
        timed_blocks = [(size, setting.batch, time_repeated(size, setting)) for size in _repeated.SIZES]
        repeated = tuple(e for e in old.repeated if e.capability != capability)
        repeated += _repeated.entry(timed_blocks, GAIN, capability, measured)
    for op in (part for part in parts if part not in OTHERS):
        tiles = [e for e in tiles if e.capability != capability or e.kernel[:-4] != op]
        for kernel, width, times in time_tiles(op, setting):
            entry_of_tile = tile_entry(kernel, width, times, capability, measured)
            tiles += [] if entry_of_tile is None else [entry_of_tile]
    return Table(tuple(attention), tuple(tiles), tuple(products), repeated)


def changes(old: Table, new: Table) -> list[str]:
    """Return a line for each entry that was removed or added."""
    before, after = ([entry for rows in table for entry in rows] for table in (old, new))
    return [f"- {e}" for e in before if e not in after] + [f"+ {e}" for e in after if e not in before]


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(PARTS)}; {unknown[0]!r} is not")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m maefast.kernels.tune", description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--only", type=_parts, default=PARTS, metavar="PARTS", help=f"of {','.join(PARTS)}; all by default")
    parser.add_argument("--output", type=Path, default=tuned.TABLE, metavar="FILE", help="instead of the installed table")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"{parser.prog} needs a GPU, torch {torch.__version__} finds none", file=sys.stderr)
        return 2
    if not kernels.HAS_TRITON and not set(options.only) <= {"attention", "gemm"}:
        print(f"{parser.prog} needs Triton for all but --only attention,gemm; it is not installed", file=sys.stderr)
        return 2
    device, old = torch.device("cuda", torch.cuda.current_device()), tuned.read()
    setting, measured = Setting(medians_on(device), device), f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    new = tuned_table(options.only, old, setting, tuned.architecture(device), measured)
    tuned.write(new, options.output)
    print("\n".join(changes(old, new)) or "nothing changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
