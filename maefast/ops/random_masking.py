"""Random masking: kept patches, where each belongs, and the mask, from the ranks of the noise."""

import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch, kernels
from .._library import register_fake
from ..dispatch import Kernel, Op
from ._checks import check_dtype, check_no_grad, shape_of

TRITON_RANKS = 1024  # patches of a row that Triton's kernel ranks by counting
CUDA_RANKS = 2048  # patches of a row that the CUDA kernel ranks by counting


class MaskingAsk(NamedTuple):
    """What the choice of a kernel depends on."""

    device: torch.device
    noise: torch.dtype
    patches: int


def _ranks_up_to(most: int, who: str) -> Callable[[MaskingAsk], str | None]:
    def why_not(ask: MaskingAsk) -> str | None:
        return f"{who} ranks up to {most} patches, noise has {ask.patches}" if ask.patches > most else None

    return why_not


_FP32 = (torch.float32,)
KERNELS = (
    Kernel("native", ("cpu",), _FP32),
    Kernel("native", ("cuda",), _FP32, why_not=_ranks_up_to(CUDA_RANKS, "native random_masking on a GPU")),
    Kernel("triton", kernels.DEVICES, _FP32, why_not=_ranks_up_to(TRITON_RANKS, "triton random_masking")),
)
AUTO = {"cpu": ("native",), "cuda": ("triton", "native")}
OP = Op("random_masking", KERNELS, AUTO, lambda device, dtype: MaskingAsk(device, torch.float32, patches=196))


def len_keep(L: int, mask_ratio: float) -> int:
    """Return the number of L patches that are kept, int(L * (1 - mask_ratio)) as the official model
    truncates it: of 100 patches a ratio of 0.9 keeps 9.

    Raises ValueError unless mask_ratio is in [0, 1).
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio must be in [0, 1); it is {mask_ratio}")
    # torch.compile makes no size of a symbolic float; an index gives one graph for each number
    return operator.index(int(L * (1 - mask_ratio)))


def random_masking(noise: Tensor, len_keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the `len_keep` patches of smallest noise in each row (He et al. 2022, section 3).

    noise        (N, L)  fp32
    returns
    ids_keep     (N, K)  int64, the kept patches in the order of their noise
    ids_restore  (N, L)  int64, the rank of each patch; rank < K means kept
    mask         (N, L)  fp32, 1 = removed
    Ties break by index and NaN ranks last, so a row of ids_restore is always a permutation.
    Raises TypeError or ValueError when noise is not (N, L) fp32 or requires a gradient, or len_keep
    is not in [0, L].
    """
    check_noise(noise, len_keep)
    backend = dispatch.choose(OP, MaskingAsk(noise.device, noise.dtype, noise.shape[1]))
    if backend != "eager":
        return dispatch.ops_of(backend).random_masking_fwd(noise, len_keep)
    return random_masking_ref(noise, len_keep)


def check_noise(noise: Tensor, len_keep: int) -> None:
    if noise.dim() != 2:
        raise ValueError(f"noise must be (N, L); its shape is {shape_of(noise)}")
    check_dtype("noise", noise, (torch.float32,))
    check_no_grad(noise=noise)
    if not 0 <= len_keep <= noise.shape[1]:
        raise ValueError(f"len_keep must be in [0, {noise.shape[1]}]; it is {len_keep}")


def random_masking_ref(noise: Tensor, len_keep: int) -> tuple[Tensor, Tensor, Tensor]:
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1, stable=True)
    return ids_shuffle[:, :len_keep].contiguous(), ids_restore, (ids_restore >= len_keep).float()


@register_fake("random_masking_fwd")
def _random_masking_fwd_fake(noise: Tensor, len_keep: int) -> tuple[Tensor, Tensor, Tensor]:
    N, L = noise.shape
    ids_keep = noise.new_empty(N, len_keep, dtype=torch.int64)
    return ids_keep, noise.new_empty(N, L, dtype=torch.int64), noise.new_empty(N, L)
