"""Attention: softmax(q k^T / sqrt(d)) v for every head, from packed projections."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _flash_attn, _torch, dispatch, gpu, tuned
from ..autocast import compute_dtype
from ..dispatch import FLOATS, Kernel, Op
from ._checks import check_floating, check_same_device, shape_of

MAX_HEAD_WIDTH = 128  # of the CPU kernel
_TILED = "cuda"  # where the native kernels have a choice of tiles
HALVES = (torch.bfloat16, torch.float16)


class AttentionAsk(NamedTuple):
    """What the choice of a kernel depends on."""

    device: torch.device
    qkv: torch.dtype
    tokens: int  # T, of keys and values
    head_width: int
    queries: bool  # whether queries of their own are given


def _why_not_cpu(ask: AttentionAsk) -> str | None:
    if ask.head_width > MAX_HEAD_WIDTH:
        return f"native attention takes heads of up to {MAX_HEAD_WIDTH}, they are {ask.head_width} wide"
    return None


def _why_not_cuda(ask: AttentionAsk) -> str | None:
    where = "native attention on a GPU"
    if ask.queries:
        return f"{where} takes packed queries alone"
    tiles = tuned.NATIVE_ATTENTION.get(ask.head_width)
    if tiles is None:
        return f"{where} takes heads {', '.join(map(str, tuned.NATIVE_ATTENTION))} wide, they are {ask.head_width} wide"
    tile = tuned.native_tile(ask.head_width, ask.tokens)
    if tile is None:
        return f"{where} takes up to {tiles[-1].last} tokens of heads {ask.head_width} wide, qkv has {ask.tokens}"
    if (available := gpu.shared_memory(ask.device)) < tile.shared_memory:
        size, needed = f"{ask.tokens} tokens, heads {ask.head_width} wide", tile.shared_memory >> 10
        return f"native attention of {size}, needs {needed} KB of shared memory, the GPU has {available >> 10}"
    return None


def _why_slow_cuda(ask: AttentionAsk) -> str | None:
    """Return why the table of measurements, which has no separate queries, prefers SDPA."""
    capability = gpu.capability(ask.device)
    if not ask.queries and tuned.fastest_attention(capability, ask.head_width, ask.tokens) == "native":
        return None
    where = f"{ask.tokens} tokens, heads {ask.head_width} wide, on sm_{capability[0]}{capability[1]}"
    return f"no measurement shows that it is faster than SDPA for {where}"


def _why_not_flash_attn(ask: AttentionAsk) -> str | None:
    return _flash_attn.why_not(ask.device, ask.qkv, ask.head_width, gpu.capability)


KERNELS = (
    Kernel("native", ("cpu",), FLOATS, why_not=_why_not_cpu),
    Kernel("native", ("cuda",), HALVES, why_not=_why_not_cuda, why_slow=_why_slow_cuda),
    Kernel("flash_attn", (), {}, capability=(0, 0), why_not=_why_not_flash_attn),
    Kernel("sdpa", (), {}, capability=(0, 0)),
)
AUTO = {"cpu": ("native", "sdpa"), "cuda": ("native", "sdpa")}
OP = Op("attention", KERNELS, AUTO, lambda device, dtype: AttentionAsk(device, dtype, tokens=50, head_width=64, queries=False))


def attention(qkv: Tensor, num_heads: int, q: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Multi-head self-attention without its projections (Vaswani et al. 2017, section 3.2).

    qkv      (N, T, 3 h d)  [q | k | v] of every token, each h = num_heads heads of d
    q        (N, M, h d)    separate queries; qkv is then (N, T, 2 h d), [k | v]
    returns  (N, T, h d), with q (N, M, h d); in the dtype of qkv, or under autocast in its dtype
    backend                 "auto", "native", "flash_attn", "sdpa" or "eager"; maefast.backend(...)
                            and MAEFAST_BACKEND override it
    Gradients for qkv and q; native ones are deterministic for any number of threads. Raises
    TypeError or ValueError when shapes, dtypes or devices do not fit, RuntimeError if the requested
    backend cannot run.
    """
    dispatch.check_backend(OP, backend, "backend")
    check_floating(qkv=qkv)
    parts, name = (3, "(N, T, 3 h d)") if q is None else (2, "(N, T, 2 h d) beside q")
    if num_heads < 1:
        raise ValueError(f"num_heads must be positive; it is {num_heads}")
    if qkv.dim() != 3 or qkv.shape[2] == 0 or qkv.shape[2] % (parts * num_heads):
        raise ValueError(f"qkv must be {name} with h = {num_heads}; its shape is {shape_of(qkv)}")
    if q is not None:
        check_floating(q=q)
        check_same_device(qkv=qkv, q=q)
        N, T, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 2
        if q.dim() != 3 or q.shape[0] != N or q.shape[2] != width:
            raise ValueError(f"q must be (N, M, h d) with N = {N} and h d = {width}; its shape is {shape_of(q)}")
        if q.dtype != qkv.dtype:
            raise TypeError(f"q must have the dtype of qkv, {qkv.dtype}; it is {q.dtype}")
        if T == 0:
            raise ValueError(f"qkv must hold at least one token; its shape is {shape_of(qkv)}")
    dtype = compute_dtype(qkv)
    qkv, q = qkv.to(dtype), None if q is None else q.to(dtype)
    ask = AttentionAsk(qkv.device, dtype, qkv.shape[1], qkv.shape[2] // (parts * num_heads), q is not None)
    chosen = dispatch.choose(OP, ask, backend)
    if chosen == "native":
        return _Attention.apply(q, qkv, num_heads)
    if chosen == "flash_attn" and qkv.numel() and (q is None or q.numel()):
        return _flash_attn.attention(qkv, num_heads, q)
    return attention_ref(qkv, num_heads, q)


def attention_ref(qkv: Tensor, num_heads: int, q: Tensor | None = None) -> Tensor:
    """torch's own attention on views, which is also the backend `sdpa`."""
    heads = qkv.unflatten(2, (3 if q is None else 2, num_heads, -1)).permute(2, 0, 3, 1, 4)  # [., N, h, T, d]
    if q is None:
        queries, keys, values = heads
    else:
        queries, (keys, values) = q.unflatten(2, (num_heads, -1)).transpose(1, 2), heads
    return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)


def tile_number(direction: str, qkv: Tensor, num_heads: int) -> int:
    """Return the `tile` of native attention that measured fastest, for "fwd" or "bwd"; 0 in an
    exported graph, which runs on other GPUs."""
    if qkv.device.type != _TILED or _torch.is_exporting():
        return 0
    return tuned.attention_tile(direction, qkv.shape[2] // (3 * num_heads), qkv.shape[1], qkv.device)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor | None, kv: Tensor, num_heads: int) -> Tensor:
        out, lse = torch.ops.maefast.attention_fwd(q, kv, num_heads, tile_number("fwd", kv, num_heads))
        ctx.save_for_backward(q, kv, *((None, None) if kv.device.type == "cpu" else (out, lse)))
        ctx.num_heads = num_heads
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, out, lse = ctx.saved_tensors
        tile = tile_number("bwd", kv, ctx.num_heads)
        dq, dkv, _ = torch.ops.maefast.attention_bwd(dout, q, kv, out, lse, ctx.num_heads, False, tile)
        return None if q is None else dq, dkv, None


@torch.library.register_fake("maefast::attention_fwd")
def _attention_fwd_fake(q: Tensor | None, kv: Tensor, num_heads: int, tile: int = 0) -> tuple[Tensor, Tensor]:
    N, T, width = kv.shape
    out = kv.new_empty(N, T, width // 3) if q is None else kv.new_empty(q.shape)
    lse = (0,) if kv.device.type == "cpu" else (N, num_heads, T)
    return out, kv.new_empty(lse, dtype=torch.float32)


@torch.library.register_fake("maefast::attention_bwd")
def _attention_bwd_fake(
    dout: Tensor,
    q: Tensor | None,
    kv: Tensor,
    out: Tensor | None,
    lse: Tensor | None,
    num_heads: int,
    with_dkv_sum: bool = False,
    tile: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    dq = kv.new_empty(0, *dout.shape[1:]) if q is None else kv.new_empty(q.shape)
    return dq, kv.new_empty(kv.shape), kv.new_empty(kv.shape[2] if with_dkv_sum else 0, dtype=torch.float32)
