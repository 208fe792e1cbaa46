"""Blocks of some tokens: the rows of given ids, and repeated tokens, computed once."""

import pytest
import torch
from block_cases import MODES, D, T, assert_like_plain, autocast, make_block, plain, random_ids, run, samples, through_modules
from support import BATCHES
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import maefast
from maefast.blocks import Block
from maefast.ops._tokens import RepeatedTokens, take_tokens


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("rows", [1, 13, T])
def test_tokens_of_ids(mode, rows):
    """Rows of the whole block, with the gradients that these alone would have."""
    dtype, cast = mode
    block = make_block(dtype)
    cases = [(x, dy, random_ids(rows)) for x, dy in samples(BATCHES, dtype, rows)]

    class Rows(nn.Module):
        def __init__(self, block: nn.Module):
            super().__init__()
            self.block = block

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            return self.block(x).gather(1, ids[..., None].expand(-1, -1, D))

    mine = Rows(block)
    mine.forward = block.forward
    assert_like_plain(mine, Rows(plain(block)), cases, cast)


def test_tokens_of_ids_with_a_hook_are_rows_of_the_whole_block():
    block, ids = make_block(), random_ids(7)
    watched = through_modules(block)
    ((x, dy),) = samples(1, rows=7)
    seen = []
    watched.norm2.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    got = run(watched, x, dy, ids=ids)
    assert seen == [(3, T, D)]
    with torch.no_grad():
        assert torch.equal(got["y"], take_tokens(watched(x), ids))
    for name, value in run(block, x, dy, ids=ids).items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4)


def test_take_tokens():
    x, ids = torch.arange(24.0).view(2, 4, 3).requires_grad_(), torch.tensor([[3, 0, 3], [1, 1, 2]])
    out = take_tokens(x, ids)
    assert torch.equal(out, torch.stack([x[n, ids[n]] for n in range(2)]))
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert dx[:, :, 0].tolist() == [[1, 0, 0, 2], [0, 2, 1, 0]]


class DecoderStart(nn.Module):
    """The decoder's input and first block, which takes each distinct token once."""

    N, L, K = 5, T - 1, 4

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block
        self.mask_token = nn.Parameter(torch.linspace(-1, 1, D).view(1, 1, D))
        self.pos_embed = nn.Parameter(torch.linspace(-2, 2, T * D).sin().view(1, T, D))

    def forward(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        tokens = (x, ids_restore, self.mask_token, self.pos_embed)
        whole = maefast.ops.unshuffle(*tokens)
        if not isinstance(self.block, Block):
            return self.block(whole)
        x, branch = self.block.advance(whole, None, repeated=RepeatedTokens.of(*tokens))
        return x + branch

    @classmethod
    def samples(cls, count: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor, Tensor]]:
        return [
            (torch.randn(cls.N, 1 + cls.K, D).to(dtype), torch.randn(cls.N, T, D), torch.rand(cls.N, cls.L).argsort(dim=1))
            for _ in range(count)
        ]


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("path", [lambda block: block, through_modules], ids=["fused", "modules"])
def test_repeated_tokens(path, mode):
    """The output is equal bit for bit, and all gradients by the rule."""
    dtype, cast = mode
    block = make_block(dtype)
    mine, eager = DecoderStart(path(block)).to(dtype), DecoderStart(plain(block)).to(dtype)
    cases = DecoderStart.samples(BATCHES, dtype)
    assert_like_plain(mine, eager, cases, cast)
    for x, _, ids in cases:
        with autocast(cast):
            whole = maefast.ops.unshuffle(x, ids, mine.mask_token, mine.pos_embed)
            assert torch.equal(mine(x, ids), mine.block(whole))
            with torch.no_grad():
                assert torch.equal(mine(x, ids), mine.block(whole))


def test_repeated_tokens_are_multiplied_once(native):
    start = DecoderStart(make_block())
    ((x, _, ids),) = DecoderStart.samples(1)
    rows = []

    class Rows(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.maefast.linear_fwd.default:
                rows.append(args[0].numel() // args[0].shape[-1])
            return func(*args, **(kwargs or {}))

    with Rows(), maefast.backend("native"):
        start(x, ids)
    tokens = DecoderStart.N * T
    assert rows == [DecoderStart.N * (1 + DecoderStart.K) + DecoderStart.L, tokens, tokens, tokens]


@pytest.mark.parametrize(("N", "L", "K"), [(1, 1, 0), (1, 6, 2), (3, 6, 0), (3, 6, 6), (4, 9, 3)])
def test_rows_of_repeated_tokens(N, L, K):
    """Expanded they are the decoder's input, and `summed` is the transpose of `expanded`."""
    x, ids_restore = torch.randn(N, 1 + K, 5), torch.rand(N, L).argsort(dim=1)
    tokens = (x, ids_restore, torch.randn(1, 1, 5), torch.randn(1, 1 + L, 5))
    repeated = RepeatedTokens.of(*tokens)
    assert repeated.len_keep() == K
    assert torch.equal(repeated.expanded(repeated.rows), maefast.ops.unshuffle(*tokens))
    y = torch.randn(N * (1 + K) + L, 3, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(N, 1 + L, 3, dtype=torch.float64)
    torch.testing.assert_close(repeated.summed(dy), torch.autograd.grad(repeated.expanded(y), y, dy)[0])
