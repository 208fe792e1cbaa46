import pytest
import torch
from op_inputs import BF16, F16, F32, UNSHUFFLE_DTYPES, Inputs
from specs import SPECS
from support import assert_equal, permutations
from torch import Tensor

from maefast import ops

pytestmark = pytest.mark.usefixtures("poisoned")

LEAVES = ("x", "mask_token", "pos_embed")


def make(N: int, L: int, K: int, D: int, dtypes: tuple[torch.dtype, ...] = UNSHUFFLE_DTYPES["fp32"]) -> Inputs:
    return SPECS["unshuffle"].make(dtypes, N, L, K, D)


def by_loops(x: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor) -> Tensor:
    N, L = ids_restore.shape
    out = torch.empty(N, 1 + L, x.shape[2], dtype=x.dtype)
    for n in range(N):
        out[n, 0] = x[n, 0] + pos_embed[0, 0]
        for i in range(L):
            rank = ids_restore[n, i]
            out[n, 1 + i] = (x[n, 1 + rank] if rank < x.shape[1] - 1 else mask_token[0, 0]) + pos_embed[0, 1 + i]
    return out


def test_by_hand(each_backend):
    x = torch.tensor([[[1.0], [2.0], [3.0]]], requires_grad=True)  # class token, then ranks 0 and 1
    mask_token = torch.tensor([[[0.5]]], requires_grad=True)
    pos_embed = torch.tensor([[[0.0], [10.0], [20.0], [30.0], [40.0]]], requires_grad=True)
    out = ops.unshuffle(x, torch.tensor([[3, 1, 0, 2]]), mask_token, pos_embed)
    assert out.flatten().tolist() == [1.0, 10.5, 23.0, 32.0, 40.5]
    out.backward(torch.tensor([[[1.0], [2.0], [4.0], [8.0], [16.0]]]))
    assert x.grad.flatten().tolist() == [1.0, 8.0, 4.0]
    assert mask_token.grad.item() == 18.0
    assert pos_embed.grad.flatten().tolist() == [1.0, 2.0, 4.0, 8.0, 16.0]


def test_reference_is_the_definition():
    inputs = make(3, 11, 4, 5)
    assert torch.equal(ops.unshuffle_ref(**inputs), by_loops(**inputs))


@pytest.mark.parametrize("dtypes", [(F16, BF16, F16), (BF16, BF16, F16), (F16, F16, BF16)], ids=["x", "pos_embed", "other"])
def test_bf16_and_fp16_promote_to_fp32(each_backend, dtypes):
    inputs = make(2, 6, 3, 5, dtypes)
    out = ops.unshuffle(**inputs)
    assert_equal(out, by_loops(**{name: t.detach().float() if name in LEAVES else t for name, t in inputs.items()}))
    out.sum().backward()
    assert [inputs[name].grad.dtype for name in LEAVES] == list(dtypes)


@pytest.mark.huge
def test_backward_of_more_than_2_31_elements(native):
    N, L, D = 2_800, 196, 4096
    dy = torch.randint(-8, 8, (1, 1 + L, D)).float().expand(N, -1, -1)
    assert dy.numel() > 2**31
    dx, dmask_token = torch.ops.maefast.unshuffle_bwd(dy, permutations(N, L), 0, F32)
    assert torch.equal(dx[:, 0], dy[:, 0])
    assert torch.equal(dmask_token[0, 0], dy[0, 1:].sum(dim=0) * N)  # whole numbers below 2^24
