import math

import pytest
import torch
from op_inputs import BF16, F16, F32, Inputs
from specs import SPECS
from support import Op, assert_equal, forward_backward
from torch import Tensor

import maefast
from maefast import ops
from maefast.testing.errors import assert_close_to_float64

pytestmark = pytest.mark.usefixtures("poisoned")
EACH_DTYPE = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])


def make(N: int, T: int, h: int, d: int, dtype: torch.dtype = F32, M: int | None = None) -> Inputs:
    return SPECS["attention"].make((dtype,), N, T, h, d, M)


def with_heads(h: int) -> Op:
    return SPECS["attention"].op((), h)


def by_loops(qkv: Tensor, h: int, q: Tensor | None = None) -> Tensor:
    """One head of one sample at a time, by the formula."""
    if q is None:
        q, qkv = qkv.tensor_split([qkv.shape[2] // 3], dim=2)
    keys, values = qkv.chunk(2, dim=2)
    out = torch.empty_like(q)
    d = q.shape[2] // h
    for n in range(q.shape[0]):
        for head in range(h):
            at = slice(head * d, (head + 1) * d)
            weights = (q[n, :, at] @ keys[n, :, at].T / math.sqrt(d)).exp()
            out[n, :, at] = weights / weights.sum(dim=1, keepdim=True) @ values[n, :, at]
    return out


def test_by_hand(each_backend):
    """Two tokens, one head of width 1: scores (0, 0) for the first, (ln 3, 0) for the second."""
    qkv = torch.tensor([[[0.0, math.log(3.0), 5.0], [1.0, 0.0, 1.0]]], requires_grad=True)
    out = ops.attention(qkv, 1)
    torch.testing.assert_close(out.flatten(), torch.tensor([3.0, 4.0]), rtol=1e-6, atol=0)
    (dqkv,) = torch.autograd.grad(out, qkv, torch.tensor([[[0.0], [1.0]]]))
    # P = (3/4, 1/4), dP = v = (5, 1), delta = 4, dS = P (dP - delta) = (3/4, -3/4)
    expected = torch.tensor([[0.0, 0.75 * math.log(3.0)], [0.75, -0.75], [0.75, 0.25]])
    torch.testing.assert_close(dqkv[0].T, expected, rtol=1e-5, atol=1e-6)


def test_reference_is_the_definition():
    for M in (None, 4):
        inputs = SPECS["attention"].exact(make(2, 7, 3, 5, M=M))
        expected = by_loops(inputs["qkv"], 3, inputs.get("q"))
        torch.testing.assert_close(ops.attention_ref(inputs["qkv"], 3, inputs.get("q")), expected, rtol=1e-12, atol=1e-12)


@EACH_DTYPE
def test_equal_logits_give_the_mean(isa, dtype):
    """Queries of zero attend to all tokens alike; exact, with whole numbers and 2^6 tokens."""
    N, T, h, d = 2, 64, 3, 20
    qkv = torch.randint(-8, 9, (N, T, 3 * h * d)).to(dtype)
    qkv[..., : h * d] = 0
    with maefast.backend("native"):
        out = ops.attention(qkv, h)
    mean = qkv[..., 2 * h * d :].double().mean(dim=1, keepdim=True).to(dtype)  # 11 bits: rounded once in bf16
    assert torch.equal(out, mean.expand(N, T, h * d))


@EACH_DTYPE
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_extreme_logits(isa, dtype, size):
    """Scores up to +-1e4, far beyond what exp can take: no NaN, and right."""
    h, d = 2, 16
    cases = []
    for _ in range(8):
        qkv = torch.randn(2, 50, 3, h * d)
        qkv[:, :, :2] *= math.sqrt(size / math.sqrt(d))
        cases.append({"qkv": qkv.flatten(2).to(dtype).requires_grad_()})
    scores = cases[0]["qkv"].detach().double()
    assert (scores[..., : h * d] * scores[..., h * d : 2 * h * d]).unflatten(2, (h, d)).sum(dim=3).abs().max() > size
    SPECS["attention"].check(cases, (dtype,), h=h)


@EACH_DTYPE
def test_one_key_takes_all(isa, dtype):
    """Scores of 1e4 against -1e4: the output is one value; queries and keys have no gradient."""
    N, T, h, d = 2, 50, 2, 16
    q, k = torch.full((N, T, h, d), 100.0), torch.full((N, T, h, d), -25.0)
    k[:, 7] = 25.0
    v = torch.randn(N, T, h, d)
    qkv = torch.cat([t.flatten(2) for t in (q, k, v)], dim=2).to(dtype).requires_grad_()
    dout = torch.randn(N, T, h * d).to(dtype)
    with maefast.backend("native"):
        results = forward_backward(with_heads(h), {"qkv": qkv}, dout)
    assert torch.equal(results["out"], qkv[:, 7:8, 2 * h * d :].expand(N, T, h * d))
    dq, dk, dv = results["d_qkv"].chunk(3, dim=2)
    assert not any(grad.any() for grad in (dq, dk, dv[:, torch.arange(T) != 7]))
    assert dv[:, 7].ne(0).all()


@EACH_DTYPE
@pytest.mark.parametrize("part", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize("payload", [0x7FC00000, 0x7FC00001, -0x400000], ids=hex)
def test_nan_stays_in_its_head_and_sample(isa, dtype, part, payload):
    """A NaN of any bits in a query spoils its row, one in a key or value the whole head."""
    N, T, h, d = 2, 19, 3, 10
    inputs = make(N, T, h, d, dtype)
    clean = inputs["qkv"].detach()
    spoilt = clean.clone()
    spoilt.view(N, T, 3, h, d)[1, 4, part, 2, 6] = torch.tensor(payload, dtype=torch.int32).view(F32).to(dtype)
    dout = torch.randn(N, T, h * d)
    expected, got = (forward_backward(with_heads(h), {"qkv": t.requires_grad_()}, dout) for t in (clean, spoilt))
    nan = {name: t.isnan().view(N, T, -1, h, d) for name, t in got.items()}
    for name, where in nan.items():
        outside = torch.ones_like(where)
        outside[1, :, :, 2] = False
        assert torch.equal(got[name].view_as(where)[outside], expected[name].view_as(where)[outside]), name
    rows = torch.arange(T) == 4 if part == 0 else torch.ones(T, dtype=torch.bool)
    columns = torch.arange(d) == 6 if part == 2 else torch.ones(d, dtype=torch.bool)
    assert torch.equal(nan["out"][1, :, 0, 2], rows[:, None] & columns)
    assert nan["d_qkv"][1, rows, 0, 2].all()


def test_heads_wider_than_the_kernel_takes(native):
    inputs = make(2, 6, 2, 129)
    out = ops.attention(inputs["qkv"], 2)
    torch.testing.assert_close(out, by_loops(inputs["qkv"].detach(), 2), rtol=1e-5, atol=1e-5)
    with maefast.backend("native"), pytest.raises(RuntimeError, match=r"native attention takes heads of up to 128.*129 wide"):
        ops.attention(inputs["qkv"], 2)


@pytest.mark.parametrize("M", [None, 3], ids=["self", "q"])
def test_autocast(each_backend, M):
    """fp32 projections are cast, as by torch, and their gradients are fp32 again."""
    inputs = make(2, 7, 2, 4, M=M)
    narrow = {name: t.detach().bfloat16().requires_grad_() for name, t in inputs.items()}
    expected = forward_backward(with_heads(2), narrow, torch.ones(2, M or 7, 8))
    got = forward_backward(torch.autocast("cpu", BF16)(with_heads(2)), inputs, torch.ones(2, M or 7, 8))
    assert_equal(got, {name: t if name == "out" else t.float() for name, t in expected.items()})
    assert got["out"].dtype == BF16


@EACH_DTYPE
@pytest.mark.parametrize("M", [None, 4], ids=["self", "q"])
def test_backward_sums_the_columns(native, dtype, M):
    """The gradient of the bias of the projection that wrote qkv."""
    inputs, dout = make(3, 9, 2, 5, dtype, M), torch.randn(3, M or 9, 10).to(dtype)
    q, qkv = (inputs[name].detach() if name in inputs else None for name in ("q", "qkv"))
    _, dkv, total = torch.ops.maefast.attention_bwd(dout, q, qkv, None, None, 2, True)
    assert torch.equal(dkv, torch.ops.maefast.attention_bwd(dout, q, qkv, None, None, 2)[1])

    def plain(wide: torch.dtype) -> Tensor:
        leaf = qkv.to(wide).requires_grad_()
        out = ops.attention_ref(leaf, 2, None if q is None else q.to(wide))
        return torch.autograd.grad(out, leaf, dout.to(wide))[0].sum(dim=(0, 1))

    assert total.dtype == F32
    assert_close_to_float64("dkv_sum", total, plain(dtype).to(F32), plain(torch.float64))
