"""Times attention backends and Triton's tiles on this GPU and rewrites the table tuned.json.

    python -m maefast.kernels.tune [--only attention,layer_norm] [--output FILE]

A few minutes. Whatever is timed is first held against float64. An entry stays where its backend is
not installed here.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ... import gemm, kernels, tuned
from ...tuned import Table
from .attention import SHAPES, attention_entries, time_attention, time_attention_tiles
from .products import product_entries, product_sizes, time_product
from .repeated import SIZES, repeated_entry, time_repeated
from .tiles import CANDIDATES, tile_entries, time_tiles
from .timed import Setting, medians_on

OTHERS = ("attention", "gemm", "repeated_tokens")  # beside the ops whose Triton tiles are timed
PARTS = (*OTHERS, *sorted({kernel[:-4] for kernel in CANDIDATES}))


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
        named = {(kernel, width) for kernel, width, _ in timed_tiles}
        tiles = [e for e in tiles if e.capability != capability or (e.kernel, e.width) not in named]
        tiles += tile_entries(timed_tiles, capability, measured)
    if "gemm" in parts:
        timed_products = [(kind, size, time_product(kind, size, setting)) for kind in gemm.KINDS for size in product_sizes(kind)]
        kinds = {kind for kind, _, times in timed_products if times}
        products = [e for e in old.gemm if e.capability != capability or e.kind not in kinds]
        products += product_entries(timed_products, capability, measured)
    if "repeated_tokens" in parts:
        timed_blocks = [(size, setting.batch, time_repeated(size, setting)) for size in SIZES]
        repeated = tuple(e for e in old.repeated if e.capability != capability)
        repeated += repeated_entry(timed_blocks, capability, measured)
    for op in (part for part in parts if part not in OTHERS):
        tiles = [e for e in tiles if e.capability != capability or e.kernel[:-4] != op]
        tiles += tile_entries(time_tiles(op, setting), capability, measured)
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
