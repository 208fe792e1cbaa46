"""Unshuffle: encoded tokens back in image order, mask tokens in the gaps, positions added."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import dispatch, kernels
from .._library import register_fake
from ..dispatch import Kernel, Op
from ._checks import check_dtype, check_floating, check_same_device, shape_of, values_are_known


class UnshuffleAsk(NamedTuple):
    """What the choice of a kernel depends on."""

    device: torch.device
    x: torch.dtype
    mask_token: torch.dtype
    pos_embed: torch.dtype


def _why_not_cuda(ask: UnshuffleAsk) -> str | None:
    if ask.mask_token == ask.pos_embed and ask.mask_token in (ask.x, torch.float32):
        return None
    dtypes = f"they are {dispatch.names_of((ask.mask_token, ask.pos_embed))} beside {dispatch.names_of((ask.x,))}"
    return f"native unshuffle on a GPU takes mask_token and pos_embed of one dtype, float32 or x's; {dtypes}"


KERNELS = (Kernel("native", ("cpu",)), Kernel("native", ("cuda",), why_not=_why_not_cuda), Kernel("triton", kernels.DEVICES))
AUTO = {"cpu": ("native",), "cuda": ("triton", "native")}
OP = Op("unshuffle", KERNELS, AUTO, lambda device, dtype: UnshuffleAsk(device, dtype, dtype, dtype))


def unshuffle(x: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor) -> Tensor:
    """Return the decoder's input (He et al. 2022, section 3, "MAE decoder").

    x            (N, 1+K, D)  class token, then the K kept tokens in shuffled order; floating-point
    ids_restore  (N, L)       int64, the rank of each patch; rank < K means kept
    mask_token   (1, 1, D)
    pos_embed    (1, 1+L, D)
    returns      (N, 1+L, D)  in the promoted dtype of x, mask_token and pos_embed
    Gradients for x, mask_token and pos_embed, deterministic.
    Raises TypeError or ValueError when shapes, dtypes or devices do not fit, and, on the CPU, when
    a row of ids_restore is no permutation.
    """
    check_floating(x=x, mask_token=mask_token, pos_embed=pos_embed)
    check_dtype("ids_restore", ids_restore, (torch.int64,))
    check_same_device(x=x, ids_restore=ids_restore, mask_token=mask_token, pos_embed=pos_embed)
    if ids_restore.dim() != 2:
        raise ValueError(f"ids_restore must be (N, L); its shape is {shape_of(ids_restore)}")
    N, L = ids_restore.shape
    if x.dim() != 3 or x.shape[0] != N or not 1 <= x.shape[1] <= L + 1:
        raise ValueError(f"x must be (N, 1+K, D) with N = {N} and K <= L = {L}; its shape is {shape_of(x)}")
    D = x.shape[2]
    if mask_token.shape != (1, 1, D):
        raise ValueError(f"mask_token must be (1, 1, {D}); its shape is {shape_of(mask_token)}")
    if pos_embed.shape != (1, 1 + L, D):
        raise ValueError(f"pos_embed must be (1, {1 + L}, {D}); its shape is {shape_of(pos_embed)}")
    backend = dispatch.choose(OP, UnshuffleAsk(x.device, x.dtype, mask_token.dtype, pos_embed.dtype))
    if backend != "eager":
        return _Unshuffle.apply(backend, x, ids_restore, mask_token, pos_embed)
    return unshuffle_ref(x, ids_restore, mask_token, pos_embed)


def unshuffle_ref(x: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor) -> Tensor:
    (N, L), D = ids_restore.shape, x.shape[2]
    if values_are_known(ids_restore) and not torch.equal(ids_restore.sort(dim=1).values, torch.arange(L).expand(N, L)):
        raise ValueError(f"ids_restore must hold a permutation of 0 .. {L - 1} in each row")
    tokens = torch.cat([x[:, 1:], mask_token.expand(N, L + 1 - x.shape[1], D)], dim=1)
    tokens = tokens.gather(1, ids_restore[..., None].expand(-1, -1, D))
    return torch.cat([x[:, :1], tokens], dim=1) + pos_embed


class _Unshuffle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, x: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor) -> Tensor:
        ctx.save_for_backward(ids_restore)
        ctx.backend, ctx.len_keep, ctx.x_dtype = backend, x.shape[1] - 1, x.dtype
        ctx.mask_token_dtype, ctx.pos_embed_dtype = mask_token.dtype, pos_embed.dtype
        return dispatch.ops_of(backend).unshuffle_fwd(x, ids_restore, mask_token, pos_embed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (ids_restore,) = ctx.saved_tensors
        dx, dmask_token = dispatch.ops_of(ctx.backend).unshuffle_bwd(dy, ids_restore, ctx.len_keep, ctx.x_dtype)
        dpos_embed = dy.sum(dim=0, keepdim=True).to(ctx.pos_embed_dtype) if ctx.needs_input_grad[4] else None
        return None, dx, None, dmask_token.to(ctx.mask_token_dtype), dpos_embed


@register_fake("unshuffle_fwd")
def _unshuffle_fwd_fake(x: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(x.dtype, mask_token.dtype), pos_embed.dtype)
    return x.new_empty(x.shape[0], 1 + ids_restore.shape[1], x.shape[2], dtype=dtype)


@register_fake("unshuffle_bwd")
def _unshuffle_bwd_fake(dy: Tensor, ids_restore: Tensor, len_keep: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    N, _, D = dy.shape
    return dy.new_empty(N, 1 + len_keep, D, dtype=dtype), dy.new_empty(1, 1, D, dtype=torch.float32)
