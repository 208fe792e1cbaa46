"""The committed table of measurements, tuned.json, by which `auto` and Triton's launchers choose.

`python -m maefast.kernels.tune` writes it; nothing is timed in the user's process. Without an entry
attention runs on SDPA, and a kernel takes the tile of its own rule.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import gpu

TABLE = Path(__file__).with_suffix(".json")
_ATTENTION_TILES = Path(__file__).with_name("attention_tiles.inc")
DEFAULT_ATTENTION = "sdpa"


class Attention(NamedTuple):
    """The fastest backend of attention for heads of this width and `first` to `last` tokens."""

    capability: str  # "9.0"
    head_width: int
    first: int
    last: int
    backend: str
    speedup: float  # of forward and backward over DEFAULT_ATTENTION, the least in this range
    measured: str  # where


class Tile(NamedTuple):
    """A tile that overrides a kernel's own rule on a GPU of this capability."""

    capability: str
    kernel: str  # the name of its op, "layer_norm_bwd"; as attention_kernel() names it
    width: int  # D, P of the kernels that read patches, or the width of a head
    tile: dict[str, int]
    speedup: float  # over the rule
    measured: str


class Gemm(NamedTuple):
    """Products that csrc/cuda/gemm computes faster than cuBLAS and a kernel for the rest."""

    capability: str
    kind: str  # as maefast/gemm.py names it
    depth: tuple[int, int]  # first and last
    features: tuple[int, int]
    rows: int  # from so many on
    speedup: float
    measured: str


class Repeated(NamedTuple):
    """A decoder whose first block is faster with its repeated mask tokens computed once."""

    capability: str
    width: int
    values: int  # of repeated tokens in a batch, from so many on
    speedup: float  # of the first block, forward and backward
    measured: str


class Table(NamedTuple):
    attention: tuple[Attention, ...]
    tiles: tuple[Tile, ...]
    gemm: tuple[Gemm, ...]
    repeated: tuple[Repeated, ...]


class NativeTile(NamedTuple):
    """A range of tokens that the attention kernels of csrc/cuda share a tile for."""

    last: int
    shared_memory: int  # bytes that forward or backward, whichever takes more, asks for


def attention_tables() -> dict[str, list[dict[str, int]]]:
    """Return the numbers in the lines of attention_tiles.inc, FORWARD and BACKWARD."""
    tables: dict[str, list[dict[str, int]]] = {"FORWARD": [], "BACKWARD": []}
    for table, columns in re.findall(r"^(\w+)\((.*)\)$", _ATTENTION_TILES.read_text(), re.MULTILINE):
        tables[table].append({name: int(value) for name, value in re.findall(r"\.(\w+) = *(\d+)", columns)})
    return tables


def _native_attention() -> dict[int, tuple[NativeTile, ...]]:
    """Return the lines of attention_tiles.inc that forward and backward take, by head width."""
    tables = attention_tables()

    def shared_memory(width: int, tokens: int) -> int:
        fits = (next(r for r in rows if r["head_width"] == width and r["tokens"] >= tokens) for rows in tables.values())
        return max(row["shared"] for row in fits)

    ends: dict[int, set[int]] = {}
    for row in (row for rows in tables.values() for row in rows):
        ends.setdefault(row["head_width"], set()).add(row["tokens"])
    return {width: tuple(NativeTile(last, shared_memory(width, last)) for last in sorted(lasts)) for width, lasts in ends.items()}


NATIVE_ATTENTION = _native_attention()


def native_tile(head_width: int, tokens: int) -> NativeTile | None:
    """Return the tile of native attention on a GPU, or None."""
    return next((tile for tile in NATIVE_ATTENTION.get(head_width, ()) if tokens <= tile.last), None)


def fitting_tiles(direction: str, head_width: int, tokens: int) -> list[dict[str, int]]:
    """Return the lines of attention_tiles.inc that take such rows, for "fwd" or "bwd"."""
    table = {"fwd": "FORWARD", "bwd": "BACKWARD"}[direction]
    return [row for row in attention_tables()[table] if row["head_width"] == head_width and row["tokens"] >= tokens]


def native_range(head_width: int, tokens: int) -> tuple[int, int]:
    """Return the first and last number of tokens of the tile that holds `tokens`."""
    tiles = NATIVE_ATTENTION[head_width]
    i = next(i for i, tile in enumerate(tiles) if tokens <= tile.last)
    return (tiles[i - 1].last + 1 if i else 1), tiles[i].last


def read(path: Path = TABLE) -> Table:
    content = json.loads(path.read_text())
    gemm = (Gemm(**row | {name: tuple(row[name]) for name in ("depth", "features")}) for row in content["gemm"])
    return Table(
        tuple(Attention(**row) for row in content["attention"]),
        tuple(Tile(**row) for row in content["tiles"]),
        tuple(gemm),
        tuple(Repeated(**row) for row in content["repeated"]),
    )


def write(table: Table, path: Path = TABLE) -> None:
    """Write one entry a line, sorted, so that a diff shows what changed."""

    def lines(rows: Iterable[Any]) -> str:
        ordered = sorted(rows, key=lambda row: (_numbers(row.capability), *row[1:3]))
        return "[" + ",".join(f"\n  {json.dumps(row._asdict())}" for row in ordered) + ("\n ]" if ordered else "]")

    parts = (f' "{name}": {lines(rows)}' for name, rows in table._asdict().items())
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def _numbers(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))


def name_of(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


_committed = read()
_tiles = {(entry.kernel, entry.width, entry.capability): entry.tile for entry in _committed.tiles}
# what the architecture matters for: asking for it takes longer than a launch has
_tuned = {key[:2] for key in _tiles}


def fastest_attention(capability: tuple[int, int], head_width: int, tokens: int) -> str:
    """Return the backend that measured fastest on such a GPU, or DEFAULT_ATTENTION."""
    name = name_of(capability)
    for entry in _committed.attention:
        if entry.capability == name and entry.head_width == head_width and entry.first <= tokens <= entry.last:
            return entry.backend
    return DEFAULT_ATTENTION


def has_faster_product(capability: tuple[int, int], kind: str, rows: int, depth: int, features: int) -> bool:
    """Return whether the table has csrc/cuda/gemm as faster than cuBLAS."""
    name = name_of(capability)
    return any(
        entry.kind == kind
        and entry.depth[0] <= depth <= entry.depth[1]
        and entry.features[0] <= features <= entry.features[1]
        and entry.capability == name
        and rows >= entry.rows
        for entry in _committed.gemm
    )


def repeats_enough(capability: tuple[int, int], width: int, values: int) -> bool:
    """Return whether the table has so many values of repeated tokens as worth computing once."""
    name = name_of(capability)
    return any(e.width == width and values >= e.values and e.capability == name for e in _committed.repeated)


def tile_for(kernel: str, width: int, device: torch.device, rule: dict[str, int]) -> dict[str, int]:
    """Return the tile for rows of `width` on `device`: `rule`, overridden by the table."""
    return rule | _tiles.get((kernel, width, architecture(device)), {}) if (kernel, width) in _tuned else rule


def attention_kernel(direction: str, head_width: int, tokens: int) -> str:
    """Return what the table calls native attention at this size, "attention_208_fwd"."""
    return f"attention_{native_range(head_width, tokens)[1]}_{direction}"


def attention_tile(direction: str, head_width: int, tokens: int, device: torch.device) -> int:
    """Return the fastest line of attention_tiles.inc among those that take such rows, by number."""
    tile = tile_for(attention_kernel(direction, head_width, tokens), head_width, device, {"tile": 0})
    return tile["tile"]


def architecture(device: torch.device) -> str:
    """Return the table's name for a device: "9.0", or "cpu" in Triton's interpreter."""
    return name_of(gpu.capability(device)) if device.type == "cuda" else device.type


@contextmanager
def trying(kernel: str, width: int, device: torch.device, tile: dict[str, int]) -> Iterator[None]:
    """Make the launcher of `kernel` take `tile` within the block; {} is its own rule."""
    global _tiles, _tuned
    before = _tiles, _tuned
    _tiles, _tuned = _tiles | {(kernel, width, architecture(device)): tile}, _tuned | {(kernel, width)}
    try:
        yield
    finally:
        _tiles, _tuned = before
