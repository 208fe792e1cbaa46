"""Timing of the decoder's first block with its repeated mask tokens computed once, and table
entries."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import ops
from ...ops._tokens import RepeatedTokens, repeated_values
from ...ops.transformer_block import BlockWeights, weight_shapes
from ...tuned import Repeated
from .timed import CHECKED, GAIN, SETS, Graph, Op, Setting, Yardstick


class Size(NamedTuple):
    """A decoder of width D; K of L patches are kept."""

    L: int
    K: int
    D: int
    num_heads: int


SIZES = (Size(196, 49, 512, 16), Size(256, 64, 512, 16))  # patches of 16 x 16 and 14 x 14
EACH, ONCE = "each", "once"  # mask token
Timed = tuple[Size, int, Mapping[str, float]]  # size, samples, times of EACH and ONCE


def first_block(size: Size, device: torch.device, half: torch.dtype, mask_tokens: str) -> Op:
    """Return what the decoder does up to its first block's output, under autocast."""

    def run(x: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor, **weights: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x, ids_restore, mask_token, pos_embed
        with torch.autocast(device.type, half):
            repeated = RepeatedTokens.of(*tokens) if mask_tokens == ONCE else None
            return ops.transformer_block(ops.unshuffle(*tokens), None, BlockWeights(**weights), size.num_heads, repeated=repeated)

    return run


def inputs(size: Size, N: int, device: torch.device, half: torch.dtype) -> dict[str, Tensor]:
    """Return the arguments of first_block for N samples."""
    L, K, D, _ = size
    shapes = weight_shapes(D, 4 * D)
    weights = {name: torch.randn(shape, device=device) / math.sqrt(shape[-1]) for name, shape in shapes.items()}
    learned = {"x": torch.randn(N, 1 + K, D, device=device).to(half), "mask_token": torch.randn(1, 1, D, device=device)}
    fixed = {"ids_restore": torch.rand(N, L, device=device).argsort(dim=1), "pos_embed": torch.randn(1, 1 + L, D, device=device)}
    return fixed | {name: tensor.requires_grad_() for name, tensor in (learned | weights).items()}


def repeated_entry(timed: Sequence[Timed], capability: str, measured: str) -> tuple[Repeated, ...]:
    """Return the entry of the width in `timed`, for batches from two thirds of the smallest
    measured, if computing mask tokens once gained at least GAIN at each size."""
    if not timed or any(ONCE not in times for _, _, times in timed):
        return ()
    speedup = min(times[EACH] / times[ONCE] for _, _, times in timed)
    if speedup < GAIN:
        return ()
    values = min(repeated_values(N, size.L, size.K, size.D) for size, N, _ in timed)
    return (Repeated(capability, timed[0][0].D, 2 * values // 3, math.floor(speedup * 100) / 100, measured),)


def time_repeated(size: Size, setting: Setting) -> dict[str, float]:
    """Time forward and backward with each mask token computed, and with each distinct one once if
    that is right."""

    def graph(N: int, mask_tokens: str, backend: str = "auto") -> Graph:
        block = first_block(size, setting.device, setting.half, mask_tokens)
        return Graph(block, inputs(size, N, setting.device, setting.half), backend)

    contenders = [EACH]
    if Yardstick(graph(min(CHECKED, setting.batch), ONCE, "eager")).accepts("auto"):
        contenders.append(ONCE)
    else:
        print("the decoder's first block without repeated tokens computed once: its results are outside the error rule")
    graphs = {name: [graph(setting.batch, name) for _ in range(SETS)] for name in contenders}
    return setting.rotate({name: lambda i, twins=twins: twins[i].results() for name, twins in graphs.items()}, SETS)  # type: ignore[misc]
