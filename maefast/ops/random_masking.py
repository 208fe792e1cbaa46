"""Random masking: which patches are kept, where each belongs, and the mask, from the ranks of the noise."""

import torch
from torch import Tensor

from .. import dispatch
from .._library import register_fake
from ._checks import check_dtype, check_no_grad, shape_of


def random_masking(noise: Tensor, len_keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps the `len_keep` patches of smallest noise in each row (He et al. 2022, section 3, "Masking").

    noise        (N, L)  fp32
    returns
    ids_keep     (N, K)  int64, the kept patches in the order of their noise
    ids_restore  (N, L)  int64, the rank of each patch: the number of j with (noise_j, j) < (noise_i, i); rank < K means kept
    mask         (N, L)  fp32, 1 = removed
    Ties break by index and NaN ranks last, so a row of ids_restore is always a permutation.
    Raises TypeError or ValueError when noise is not (N, L) fp32, requires a gradient, or len_keep is not in [0, L].
    """
    if noise.dim() != 2:
        raise ValueError(f"noise must be (N, L); its shape is {shape_of(noise)}")
    check_dtype("noise", noise, (torch.float32,))
    check_no_grad(noise=noise)
    if not 0 <= len_keep <= noise.shape[1]:
        raise ValueError(f"len_keep must be in [0, {noise.shape[1]}]; it is {len_keep}")
    backend = dispatch.choose("random_masking", {"noise": noise})
    if backend != "eager":
        return dispatch.ops_of(backend).random_masking_fwd(noise, len_keep)
    return random_masking_ref(noise, len_keep)


def random_masking_ref(noise: Tensor, len_keep: int) -> tuple[Tensor, Tensor, Tensor]:
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1, stable=True)
    return ids_shuffle[:, :len_keep].contiguous(), ids_restore, (ids_restore >= len_keep).float()


@register_fake("random_masking_fwd")
def _random_masking_fwd_fake(noise: Tensor, len_keep: int) -> tuple[Tensor, Tensor, Tensor]:
    N, L = noise.shape
    ids_keep = noise.new_empty(N, len_keep, dtype=torch.int64)
    return ids_keep, noise.new_empty(N, L, dtype=torch.int64), noise.new_empty(N, L)
