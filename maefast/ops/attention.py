"""Attention: softmax(q k^T / sqrt(d)) v for every head, from the packed projections of a Vision Transformer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _flash_attn, dispatch
from ._checks import check_floating, check_same_device, shape_of


def attention(qkv: Tensor, num_heads: int, q: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Multi-head self-attention without its projections (Vaswani et al. 2017, section 3.2), h = num_heads.

    qkv      (N, T, 3 h d)  queries, keys and values of every token as the qkv Linear writes them: [q | k | v], each h heads of d
    q        (N, M, h d)    queries of their own; then qkv holds keys and values alone, (N, T, 2 h d): [k | v]
    returns  (N, T, h d), with q (N, M, h d); in the dtype of qkv, or under autocast in its dtype
    backend                 "auto", or what must run it, unless maefast.backend(...) or MAEFAST_BACKEND binds attention: "native",
                            "flash_attn", "sdpa" or "eager"
    Scores are scaled by 1 / sqrt(d). Gradients for qkv and q, native ones deterministic and independent of the number of threads.
    Raises TypeError or ValueError when shapes, dtypes or devices do not fit, RuntimeError where what was asked for cannot run.
    """
    dispatch.check_attention_backend(backend, "backend")
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
    dtype = dispatch.compute_dtype(qkv)
    qkv, q = qkv.to(dtype), None if q is None else q.to(dtype)
    inputs = {"qkv": qkv} if q is None else {"qkv": qkv, "q": q}
    chosen = dispatch.choose("attention", inputs, qkv.shape[2] // (parts * num_heads), backend)
    if chosen == "native":
        return _Attention.apply(q, qkv, num_heads)
    if chosen == "flash_attn" and all(tensor.numel() for tensor in inputs.values()):
        return _flash_attn.attention(qkv, num_heads, q)
    return attention_ref(qkv, num_heads, q)


def attention_ref(qkv: Tensor, num_heads: int, q: Tensor | None = None) -> Tensor:
    """torch's own attention, on views: the backend `sdpa` too."""
    heads = qkv.unflatten(2, (3 if q is None else 2, num_heads, -1)).permute(2, 0, 3, 1, 4)  # each [N, h, T, d]
    if q is None:
        queries, keys, values = heads
    else:
        queries, (keys, values) = q.unflatten(2, (num_heads, -1)).transpose(1, 2), heads
    return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor | None, kv: Tensor, num_heads: int) -> Tensor:
        out, lse = torch.ops.maefast.attention_fwd(q, kv, num_heads)
        needs = (None, None) if kv.device.type == "cpu" else (out, lse)
        ctx.save_for_backward(q, kv, *needs)
        ctx.num_heads = num_heads
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, out, lse = ctx.saved_tensors
        dq, dkv, _ = torch.ops.maefast.attention_bwd(dout, q, kv, out, lse, ctx.num_heads)
        return None if q is None else dq, dkv, None


@torch.library.register_fake("maefast::attention_fwd")
def _attention_fwd_fake(q: Tensor | None, kv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
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
) -> tuple[Tensor, Tensor, Tensor]:
    dq = kv.new_empty(0, *dout.shape[1:]) if q is None else kv.new_empty(q.shape)
    return dq, kv.new_empty(kv.shape), kv.new_empty(kv.shape[2] if with_dkv_sum else 0, dtype=torch.float32)
