"""Tokens taken by their numbers, and the decoder's input with each distinct token once."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class RepeatedTokens(NamedTuple):
    """The decoder's input (N, 1+L, D) with each distinct token once: at one position the mask token
    is the same in every sample (He et al. 2022, section 3), so what a token alone decides need not
    be computed for each.

    rows         (N (1+K) + L, D)  class token and kept tokens of each sample, shuffled; then the
                 mask token at each position
    ids_restore  (N, L)            int64, the rank of each patch; rank < K means kept
    """

    rows: Tensor
    ids_restore: Tensor

    @classmethod
    def of(cls, x: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor) -> "RepeatedTokens":
        """Make them from the arguments of ops.unshuffle."""
        token = _unshuffled(ids_restore, x.shape[1] - 1)
        rows = (x + F.embedding(token, pos_embed[0])).flatten(0, 1)
        return cls(torch.cat([rows, (mask_token + pos_embed[:, 1:])[0]]), ids_restore)

    # Dynamo of torch 2.10 sees through methods of a named tuple, not through properties
    def len_keep(self) -> int:
        N, L = self.ids_restore.shape
        return (self.rows.shape[0] - L) // N - 1

    def expanded(self, y: Tensor) -> Tensor:
        """Return the values of the tokens, (N, 1+L, C), from those of the rows, (N (1+K) + L, C)."""
        (N, L), K = self.ids_restore.shape, self.len_keep()
        first = (1 + K) * torch.arange(N, device=y.device)[:, None]  # row of each sample
        mask_token = N * (1 + K) + torch.arange(L, device=y.device)
        row = torch.where(self.ids_restore < K, first + 1 + self.ids_restore, mask_token)
        return y.index_select(0, torch.cat([first, row], dim=1).flatten()).view(N, 1 + L, y.shape[1])

    def summed(self, dy: Tensor) -> Tensor:
        """Return the gradients of the rows, (N (1+K) + L, C), from those of the tokens, (N, 1+L,
        C): sums in fp32 and a fixed order, rounded once."""
        K = self.len_keep()
        kept = take_tokens(dy, _unshuffled(self.ids_restore, K)).flatten(0, 1)
        removed = (self.ids_restore >= K).to(dy.dtype).t()[:, None]
        return torch.cat([kept, torch.bmm(removed, dy[:, 1:].transpose(0, 1))[:, 0]])


# of mask tokens in a batch, from which on those at one position are worth computing once
REPEATED_VALUES = 1 << 18


def repeats_enough(x: Tensor, len_keep: int) -> bool:
    """Return whether the mask tokens of x (N, 1+L, D) that other samples have too outweigh what it
    costs to sort them out."""
    N, tokens, D = x.shape
    return x.device.type == "cpu" and (N * (tokens - 1 - len_keep) - tokens) * D >= REPEATED_VALUES


def _unshuffled(ids_restore: Tensor, len_keep: int) -> Tensor:
    """Return (N, 1+K): the token of the image that the class token and each kept token are."""
    return F.pad(1 + ids_restore.argsort(dim=1)[:, :len_keep], (1, 0))


def take_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """x (N, T, D), ids (N, K) -> (N, K, D). As rows of one matrix: a gather along dim 1 is 4 to 10
    times slower on the CPU."""
    N, T, D = x.shape
    rows = ids + T * torch.arange(N, device=ids.device)[:, None]
    return x.reshape(N * T, D).index_select(0, rows.flatten()).view(N, ids.shape[1], D)
