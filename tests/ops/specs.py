"""The table of test_battery.py: how each op is called, in which dtypes and sizes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import op_inputs as of
import torch
from op_inputs import Dtypes, Inputs, NativeCall, Size
from support import Op, check_op, lay_out
from torch import Tensor

from maefast import ops

Layout = Callable[[Tensor], Tensor]


class Grid(NamedTuple):
    """Sizes, each in all dtypes; `repeats` inputs are held to the error rule as one tensor."""

    sizes: Sequence[Size]
    dtypes: Sequence[str]
    repeats: int = 8


def incoming(out: Tensor) -> Tensor:
    """A gradient that every dtype holds exactly, so that its rounding hides nothing."""
    return torch.randn(out.shape).bfloat16() if out.dim() else torch.full_like(out, 0.375)


@dataclass(frozen=True)
class OpSpec:
    op: Callable[..., Op]  # (dtypes, **size): the op, its results in one tensor
    make: Callable[..., Inputs]  # (dtypes, **size)
    dtypes: dict[str, Dtypes]
    grids: tuple[Grid, ...]  # held to the error rule on every instruction set
    layouts: Grid
    strided: Grid  # on inputs that repeat in memory
    parallel: Grid  # work for several threads
    empty: Sequence[Size]  # no values, and so gradients of zero
    small: Sequence[Size]  # for checks by finite differences and of graphs; the first has every leaf
    native: Callable[..., Iterator[NativeCall]] | None  # (inputs, dtypes, **size): calls for opcheck
    exact: Callable[[Inputs], Inputs] = lambda inputs: {k: t.double() if t.is_floating_point() else t for k, t in inputs.items()}
    takes_images: bool = False

    def check(self, cases: list[Inputs], dtypes: Dtypes, layout: Layout = lambda t: t, **size: Any) -> None:
        """Hold the native kernel to the error rule, inputs and gradient laid out by `layout`."""

        def laid_out(inputs: Inputs) -> Inputs:
            return {name: lay_out(layout, t) for name, t in inputs.items()}

        check_op(self.op(dtypes, **size), cases, self.exact, lambda out: layout(incoming(out)), laid_out)


def of_rows(op, make, native, dtypes: dict[str, Dtypes], few: Sequence[str], *shapes: tuple[int, ...]) -> OpSpec:
    """Specify an op on rows: each of `shapes` in all dtypes, any number of rows in a few."""
    return OpSpec(
        op,
        make,
        dtypes,
        grids=(Grid(of.shapes(*shapes), tuple(dtypes)), Grid(ROWS, few, repeats=4)),
        layouts=Grid(of.shapes((3, 9, 21)), few),
        strided=Grid(of.shapes((3, 9, 21)), ("fp32",)),
        parallel=Grid(of.shapes((2000, 130)), ("fp32",)),
        empty=of.shapes((0, 5), (3, 0, 5)),
        small=of.shapes((2, 9, 5)),
        native=native,
    )


# one row, several chunks of rows of any size
ROWS = of.shapes((20,), (1, 20), (16, 20), (17, 20), (2, 3, 5, 20), (2500, 20), (40_000, 3))
NORM_FEW, GELU_FEW = ("fp32", "bf16", "autocast"), ("fp32", "bf16", "no_bias")
# rows, in, out: multiples of nothing, one of each, a task and one more, several parts of a sum
PRODUCTS = [(7, 5, 3), (1, 1, 1), (1, 300, 1), (50, 64, 200), (145, 257, 49), (13, 48, 600), (3, 1000, 70), (300, 17, 97)]
PRODUCT_SIZES = [{"shape": (rows, depth), "features": features} for rows, depth, features in PRODUCTS]
OF_ONE_VALUE = [size for size in PRODUCT_SIZES if size["shape"][0] * size["features"] == 1]
QUERIES = [(1, 197), (147, 197), (49, 50), (25, 1), (60, 7), (1, 1)]  # M, T
NO_TOKENS = [(0, 5, None), (0, 5, 3), (2, 0, None), (2, 5, 0), (0, 5, 0)]  # N, T, M
KEPT = [(2, 1, 0), (2, 1, 1), (1, 5, 0), (3, 5, 5), (3, 196, 49), (2, 300, 1), (1, 3000, 750)]  # N, L, K
WIDTHS = [(5, 7, D) for D in (1, 2, 15, 63, 130, 768)]
PATCHES = [(1, 2), (2, 2), (7, 5), (14, 14), (16, 16)]

SPECS = {
    "layer_norm": of_rows(
        of.layer_norm, of.make_layer_norm, of.native_layer_norm, of.NORM_DTYPES, NORM_FEW, *WIDTHS, (3, 1280), (3, 5000)
    ),  # the last two: sums of several short runs
    "add_layer_norm": of_rows(
        of.add_layer_norm, of.make_add_layer_norm, of.native_add_layer_norm, of.ADD_NORM_DTYPES, NORM_FEW, *WIDTHS
    ),
    "bias_gelu": of_rows(
        lambda dtypes, shape: ops.bias_gelu,
        of.make_bias_gelu,
        of.native_bias_gelu,
        of.GELU_DTYPES,
        GELU_FEW,
        *WIDTHS,
        (3, 7, 3072),
    ),
    "linear": OpSpec(
        op=lambda dtypes, shape, features: ops.linear,
        make=of.make_linear,
        dtypes=of.LINEAR_DTYPES,
        grids=(
            Grid([size for size in PRODUCT_SIZES if size not in OF_ONE_VALUE], tuple(of.LINEAR_DTYPES)),
            Grid(OF_ONE_VALUE, tuple(of.LINEAR_DTYPES), repeats=64),  # few values of eager may be nearly exact by chance
            Grid([{"shape": shape, "features": 4} for shape in ((6,), (1, 6), (2, 3, 6), (2, 1, 3, 6))], ("fp32",), repeats=20),
        ),
        layouts=Grid([{"shape": shape, "features": 53} for shape in ((2, 9, 70), (150, 70))], ("fp32", "bf16"), repeats=4),
        strided=Grid([{"shape": (2, 9, 70), "features": 53}], ("no_bias", "no_bias_bf16")),
        parallel=Grid([{"shape": (5, 97, 300), "features": 530}], ("fp32", "bf16")),
        empty=(),  # its result is the bias
        small=({"shape": (2, 9, 5), "features": 7},),
        native=of.native_linear,
    ),
    "attention": OpSpec(
        op=of.attention,
        make=of.make_attention,
        dtypes=of.SAME,
        grids=(
            Grid([{"N": 2, "T": T, "h": 3, "d": 32} for T in (1, 2, 49, 50, 65)], tuple(of.SAME)),
            Grid([{"N": 2, "T": T, "h": 3, "d": 32} for T in (197, 257, 300)], tuple(of.SAME), repeats=2),
            Grid([{"N": 2, "T": 50, "h": 2, "d": d} for d in (1, 5, 8, 16, 32, 33, 64, 80, 128)], tuple(of.SAME)),
            Grid([{"N": 2, "T": T, "h": 3, "d": 16, "M": M} for M, T in QUERIES], tuple(of.SAME)),
        ),
        layouts=Grid([{"N": 3, "T": 19, "h": 2, "d": 9, "M": M} for M in (None, 10)], tuple(of.SAME)),
        strided=Grid([{"N": 3, "T": 19, "h": 2, "d": 9, "M": M} for M in (None, 10)], ("fp32",)),
        parallel=Grid([{"N": 5, "T": 197, "h": 3, "d": 32, "M": M} for M in (None, 147)], tuple(of.SAME)),
        empty=[{"N": N, "T": T, "h": 2, "d": 4, "M": M} for N, T, M in NO_TOKENS],
        small=[{"N": 2, "T": 9, "h": 2, "d": 5, "M": M} for M in (4, None)],
        native=of.native_attention,
    ),
    "unshuffle": OpSpec(
        op=lambda dtypes, **size: ops.unshuffle,
        make=of.make_unshuffle,
        dtypes=of.UNSHUFFLE_DTYPES,
        grids=(
            Grid([{"N": 3, "L": 70, "K": 17, "D": D} for D in (1, 63, 768)], tuple(of.UNSHUFFLE_DTYPES)),
            Grid([{"N": N, "L": L, "K": K, "D": 20} for N, L, K in KEPT], ("fp32", "autocast")),
            Grid([{"N": 6, "L": 1500, "K": 400, "D": 512}], ("fp32",), repeats=1),  # stores past the caches
        ),
        layouts=Grid([{"N": 3, "L": 9, "K": 4, "D": 21}], ("fp32", "bf16", "fp16")),
        strided=Grid([{"N": 3, "L": 9, "K": 4, "D": 21}], ("fp32",)),
        parallel=Grid([{"N": 5, "L": 196, "K": 49, "D": 130}], ("fp32", "autocast")),
        empty=tuple({"N": 0, "L": 7, "K": K, "D": 4} for K in (2, 0, 7)),
        small=({"N": 2, "L": 9, "K": 4, "D": 5},),
        native=of.native_unshuffle,
    ),
    "masked_mse": OpSpec(
        op=of.masked_mse,
        make=of.make_masked_mse,
        dtypes=of.MSE_DTYPES,
        grids=(
            Grid([{"patch": patch, "norm_pix": norm} for patch in PATCHES for norm in (True, False)], tuple(of.MSE_DTYPES), 16),
            Grid([{"patch": (7, 5), "C": C} for C in (1, 3, 4, 13)], ("fp32", "fp32_uint8", "autocast"), repeats=16),
            Grid([{"patch": (1, 1), "C": 1, "grid": (13, 17), "norm_pix": False}], ("fp32",), repeats=16),
            Grid([{"patch": (4, 4), "N": 3, "weights": weights} for weights in of.WEIGHTS], ("fp32", "autocast"), repeats=16),
            Grid([{"patch": (7, 5), "N": 3, "compact": True}], tuple(of.MSE_DTYPES), repeats=16),
            Grid([{"patch": (16, 16), "N": 4, "grid": (36, 40)}], ("fp32",), repeats=1),  # stores past the caches
        ),
        layouts=Grid([{"patch": (8, 6)}], ("fp32", "bf16", "fp16", "fp32_uint8"), repeats=16),
        strided=Grid([{"patch": (4, 4), "N": 3, "weights": "any"}], ("fp32",)),
        parallel=Grid([{"patch": (16, 16), "N": 4, "grid": (8, 9), "compact": compact} for compact in (True, False)], ("fp32",)),
        empty=(),  # its loss is NaN
        small=tuple({"patch": (2, 5), "compact": c, "norm_pix": n} for c in (False, True) for n in (True, False)),
        native=of.native_masked_mse,
        exact=of.exact_masked_mse,
        takes_images=True,
    ),
    "transformer_block": OpSpec(
        op=of.block,
        make=of.make_block,
        dtypes=of.BLOCK_DTYPES,
        grids=(
            # On scalar, two of ten seeds reached 1.5 times the limit with 8 cases, 0.81 with 32.
            Grid([{"pending": pending} for pending in (True, False)], tuple(of.BLOCK_DTYPES), repeats=32),
        ),
        layouts=Grid([{}], ("fp32",), repeats=32),
        strided=Grid([{}], ("fp32",)),
        parallel=Grid([{"N": 3, "T": 50}], ("fp32",)),
        empty=({"N": 0}, {"T": 0}),
        small=({"T": 3}, {"T": 3, "pending": False}),
        native=None,  # a Function of other ops
    ),
}
