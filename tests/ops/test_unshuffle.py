import pytest
import torch
from support import (
    LAYOUTS,
    assert_once_differentiable,
    assert_same_for_any_threads,
    check_op,
    forward_backward,
    lay_out,
    permutations,
)
from torch import Tensor

from maefast import ops

pytestmark = pytest.mark.usefixtures("poisoned")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# x, mask_token, pos_embed; under autocast x alone is bf16
DTYPES = {
    "fp32": (F32, F32, F32),
    "bf16": (BF16, BF16, BF16),
    "fp16": (F16, F16, F16),
    "autocast": (BF16, F32, F32),
    "autocast_fp16": (F16, F32, F32),
    "mixed": (F32, BF16, F16),
    "halves": (F16, BF16, F16),  # promoted to fp32
}
LEAVES = ("x", "mask_token", "pos_embed")


def make(N: int, L: int, K: int, D: int, dtypes: tuple[torch.dtype, ...] = (F32, F32, F32)) -> dict[str, Tensor]:
    return {
        "x": torch.randn(N, 1 + K, D).to(dtypes[0]).requires_grad_(),
        "ids_restore": permutations(N, L),
        "mask_token": torch.randn(1, 1, D).to(dtypes[1]).requires_grad_(),
        "pos_embed": torch.randn(1, 1 + L, D).to(dtypes[2]).requires_grad_(),
    }


def exact(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if name in LEAVES else t for name, t in inputs.items()}


def check(cases: list[dict[str, Tensor]], layout=lambda inputs: inputs, dy_layout=lambda dy: dy) -> None:
    def dy(out: Tensor) -> Tensor:
        return dy_layout(torch.randn(out.shape))

    check_op(ops.unshuffle, cases, exact, dy, layout)


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


def test_reference_gradients():
    inputs = {name: t.detach().requires_grad_(name in LEAVES) for name, t in exact(make(2, 5, 2, 3)).items()}
    assert torch.autograd.gradcheck(ops.unshuffle, tuple(inputs.values()))


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("D", [1, 63, 768])
def test_widths(isa, D, dtypes):
    check([make(3, 70, 17, D, dtypes) for _ in range(8)])


@pytest.mark.parametrize(("N", "L", "K"), [(2, 1, 0), (2, 1, 1), (1, 5, 0), (3, 5, 5), (3, 196, 49), (2, 300, 1), (1, 3000, 750)])
@pytest.mark.parametrize("dtypes", [DTYPES["fp32"], DTYPES["autocast"]], ids=["fp32", "autocast"])
def test_lengths(isa, N, L, K, dtypes):
    check([make(N, L, K, 20, dtypes) for _ in range(8)])


@pytest.mark.parametrize("dtypes", [DTYPES["fp32"], DTYPES["bf16"], DTYPES["fp16"]], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(isa, layout, dtypes):
    check(
        [make(3, 9, 4, 21, dtypes) for _ in range(8)],
        layout=lambda inputs: {name: lay_out(layout, t) for name, t in inputs.items()},
        dy_layout=layout,
    )


@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_zero_strides(isa, dims):
    def expanded(t: Tensor) -> Tensor:
        shape = [1 if dim in dims else size for dim, size in enumerate(t.shape)]
        return t.detach()[tuple(slice(size) for size in shape)].expand(t.shape).requires_grad_(t.requires_grad)

    cases = [make(3, 9, 4, 21) for _ in range(20)]
    names = (*LEAVES, "ids_restore") if dims == (0,) else LEAVES
    check([inputs | {name: expanded(inputs[name]) for name in names} for inputs in cases], dy_layout=expanded)


def test_large_output(isa):
    """Large enough for stores past the caches."""
    check([make(6, 1500, 400, 512)])


@pytest.mark.parametrize(("N", "K"), [(0, 2), (0, 0), (0, 7)])
def test_no_samples(each_backend, N, K):
    inputs = make(N, 7, K, 4)
    out = ops.unshuffle(**inputs)
    assert out.shape == (0, 8, 4)
    dx, dmask_token, dpos_embed = torch.autograd.grad(out.sum(), [inputs[name] for name in LEAVES])
    assert dx.shape == (0, 1 + K, 4)
    assert dmask_token.tolist() == [[[0] * 4]]
    assert dpos_embed.tolist() == [[[0] * 4] * 8]


def test_other_dtypes_run_eagerly():
    double = exact(make(2, 6, 3, 5))
    out = ops.unshuffle(**double)
    assert out.dtype == torch.float64
    assert torch.equal(out, by_loops(**double))


@pytest.mark.parametrize("leaf", LEAVES)
def test_one_gradient_at_a_time(native, leaf):
    inputs = make(3, 20, 6, 9)
    dy = torch.randn(3, 21, 9)
    expected = forward_backward(ops.unshuffle, inputs, dy)[f"d_{leaf}"]
    alone = {name: t.detach().requires_grad_(name == leaf) for name, t in inputs.items()}
    assert torch.equal(forward_backward(ops.unshuffle, alone, dy)[f"d_{leaf}"], expected)


def test_once_differentiable(native):
    assert_once_differentiable(ops.unshuffle, make(2, 20, 6, 9))


@pytest.mark.parametrize("dtypes", [DTYPES["halves"], (BF16, BF16, F16), (F16, F16, BF16)], ids=["x", "pos_embed", "other"])
def test_bf16_and_fp16_promote_to_fp32(each_backend, dtypes):
    inputs = make(2, 6, 3, 5, dtypes)
    out = ops.unshuffle(**inputs)
    assert out.dtype == F32
    assert torch.equal(out, by_loops(**{name: t.detach().float() if name in LEAVES else t for name, t in inputs.items()}))
    out.sum().backward()
    assert [inputs[name].grad.dtype for name in LEAVES] == list(dtypes)


@pytest.mark.parametrize("dtypes", [DTYPES["fp32"], DTYPES["autocast"]], ids=["fp32", "autocast"])
def test_deterministic(isa, dtypes):
    inputs, dy = make(5, 196, 49, 130, dtypes), torch.randn(5, 197, 130)
    assert_same_for_any_threads(lambda: forward_backward(ops.unshuffle, inputs, dy))


@pytest.mark.huge
def test_forward_of_more_than_2_31_elements(native):
    N, L, K, D = 10_700, 196, 49, 1024
    inputs = {name: t.detach() for name, t in make(1, L, K, D, DTYPES["bf16"]).items()}
    expected = ops.unshuffle_ref(**inputs)[0]
    out = ops.unshuffle(**inputs | {"x": inputs["x"].expand(N, -1, -1), "ids_restore": inputs["ids_restore"].expand(N, -1)})
    assert out.numel() > 2**31
    for n in (0, N // 2, N - 1):
        assert torch.equal(out[n], expected)


@pytest.mark.huge
def test_backward_of_more_than_2_31_elements(native):
    N, L, D = 2_800, 196, 4096
    dy = torch.randint(-8, 8, (1, 1 + L, D)).float().expand(N, -1, -1)
    assert dy.numel() > 2**31
    dx, dmask_token = torch.ops.maefast.unshuffle_bwd(dy, permutations(N, L), 0, F32)
    assert torch.equal(dx[:, 0], dy[:, 0])
    assert torch.equal(dmask_token[0, 0], dy[0, 1:].sum(dim=0) * N)  # whole numbers below 2^24


def test_opcheck(native):
    for name in ("fp32", "fp16", "halves"):
        inputs = {name: t.detach() for name, t in make(2, 9, 4, 5, DTYPES[name]).items()}
        torch.library.opcheck(torch.ops.maefast.unshuffle_fwd.default, tuple(inputs.values()))
    for dtype in (BF16, F16):
        args = (torch.randn(2, 10, 5), inputs["ids_restore"], 4, dtype)
        torch.library.opcheck(torch.ops.maefast.unshuffle_bwd.default, args)
