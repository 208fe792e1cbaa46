"""Tokens taken by index, and the decoder's input with each distinct token once."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import gpu, tuned


class RepeatedTokens(NamedTuple):
    """The decoder's input (N, 1+L, D) with each distinct token once: all samples share the mask
    token of a position (He et al. 2022, section 3), and what follows from it alone."""

    rows: Tensor  # (N (1+K) + L, D): class and kept tokens of each sample, then mask tokens
    ids_restore: Tensor  # (N, L) int64, the rank of each patch; rank < K means kept

    @classmethod
    def of(cls, x: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor) -> "RepeatedTokens":
        """Return them from the arguments of ops.unshuffle."""
        token = _unshuffled(ids_restore, x.shape[1] - 1)
        rows = (x + F.embedding(token, pos_embed[0])).flatten(0, 1)
        return cls(torch.cat([rows, (mask_token + pos_embed[:, 1:])[0]]), ids_restore)

    # Dynamo of torch 2.10 sees through methods of a named tuple, not through properties
    def len_keep(self) -> int:
        N, L = self.ids_restore.shape
        return (self.rows.shape[0] - L) // N - 1

    def expanded(self, y: Tensor) -> Tensor:
        """Return values y (N (1+K) + L, C) of the rows as values (N, 1+L, C) of the tokens."""
        (N, L), K = self.ids_restore.shape, self.len_keep()
        first = (1 + K) * torch.arange(N, device=y.device)[:, None]  # row of each sample
        mask_token = N * (1 + K) + torch.arange(L, device=y.device)
        row = torch.where(self.ids_restore < K, first + 1 + self.ids_restore, mask_token)
        return y.index_select(0, torch.cat([first, row], dim=1).flatten()).view(N, 1 + L, y.shape[1])

    def summed(self, dy: Tensor) -> Tensor:
        """Return the gradients of the rows from those of the tokens, dy (N, 1+L, C): fp32 sums in a
        fixed order, rounded once."""
        K = self.len_keep()
        kept = take_tokens(dy, _unshuffled(self.ids_restore, K)).flatten(0, 1)
        removed = (self.ids_restore >= K).to(dy.dtype).t()[:, None]
        return torch.cat([kept, torch.bmm(removed, dy[:, 1:].transpose(0, 1))[:, 0]])


REPEATED_VALUES = 1 << 18  # of mask tokens in a batch that are worth computing once on a CPU


def repeats_enough(x: Tensor, len_keep: int) -> bool:
    """Return whether the shared mask tokens of x (N, 1+L, D) are worth computing once."""
    N, tokens, D = x.shape
    values = repeated_values(N, tokens - 1, len_keep, D)
    if x.device.type == "cuda":
        return tuned.repeats_enough(gpu.capability(x.device), D, values)
    return x.device.type == "cpu" and values >= REPEATED_VALUES


def repeated_values(N: int, L: int, len_keep: int, D: int) -> int:
    """Return how many values are not computed where mask tokens are computed once."""
    return (N * (L - len_keep) - L - 1) * D


def _unshuffled(ids_restore: Tensor, len_keep: int) -> Tensor:
    """Return (N, 1+K): the indices of the class token and of each kept token in the image."""
    return F.pad(1 + ids_restore.argsort(dim=1)[:, :len_keep], (1, 0))


def take_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Return the tokens ids (N, K) of x (N, T, D); a gather along dim 1 is 4 to 10 times slower."""
    N, T, D = x.shape
    rows = ids + T * torch.arange(N, device=ids.device)[:, None]
    return x.reshape(N * T, D).index_select(0, rows.flatten()).view(N, ids.shape[1], D)
