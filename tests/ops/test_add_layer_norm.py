from collections.abc import Callable

import pytest
import torch
from support import LAYOUTS, assert_once_differentiable, assert_same_for_any_threads, check_op, lay_out, sliced
from torch import Tensor

from maefast import ops

pytestmark = pytest.mark.usefixtures("poisoned")

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# x, residual, weight and bias, result; under autocast x and the result are bf16
DTYPES = {
    "fp32": (F32, F32, F32, F32),
    "bf16": (BF16, BF16, BF16, BF16),
    "fp16": (F16, F16, F16, F16),
    "autocast": (BF16, F32, F32, BF16),
    "bf16_residual": (F32, BF16, F32, F32),
    "two_halves": (F16, BF16, BF16, F16),
}
FEW = {name: DTYPES[name] for name in ("fp32", "bf16", "autocast")}
LEAVES = ("x", "residual", "weight", "bias")
EPS = 1e-6


def make(*shape: int, dtypes: tuple[torch.dtype, ...] = DTYPES["fp32"]) -> dict[str, Tensor]:
    return {
        "x": torch.randn(shape).to(dtypes[0]).requires_grad_(),
        "residual": (2 * torch.randn(shape) + 1).to(dtypes[1]).requires_grad_(),
        "weight": (1 + torch.randn(shape[-1])).to(dtypes[2]).requires_grad_(),
        "bias": torch.randn(shape[-1]).to(dtypes[2]).requires_grad_(),
    }


def into(dtype: torch.dtype, outputs: tuple[int, ...] = (0, 1)) -> Callable[..., Tensor]:
    """The chosen outputs of the op side by side, the normalised sum in `dtype`, fp64 for the exact one."""

    def op(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        both = ops.add_layer_norm(x, residual, weight, bias, EPS, F64 if x.dtype == F64 else dtype)
        return torch.stack([both[i] for i in outputs]) if len(outputs) == 1 else torch.cat([both[i].flatten() for i in outputs])

    return op


def incoming(out: Tensor) -> Tensor:
    """Gradients that bf16 holds exactly, so that their rounding hides nothing."""
    return torch.randn(out.shape).bfloat16()


def check(
    cases: list[dict[str, Tensor]],
    dtype: torch.dtype = F32,
    layout=lambda inputs: inputs,
    outputs: tuple[int, ...] = (0, 1),
) -> None:
    def exact(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.double() for name, t in inputs.items()}

    check_op(into(dtype, outputs), cases, exact, incoming, layout)


def test_by_paper_and_pencil(each_backend):
    """The sum has mean 2 and variance 1, and eps 3 makes the root 2."""
    inputs = {
        "x": torch.tensor([[5.0, -1.0]], requires_grad=True),
        "residual": torch.tensor([[-4.0, 4.0]], requires_grad=True),
        "weight": torch.tensor([2.0, 4.0], requires_grad=True),
        "bias": torch.tensor([1.0, -1.0], requires_grad=True),
    }
    y, total = ops.add_layer_norm(**inputs, eps=3.0)
    assert y.tolist() == [[0.0, 1.0]]
    assert total.tolist() == [[1.0, 3.0]]
    (y.sum() + 8 * total[0, 1]).backward()
    assert inputs["x"].grad.tolist() == inputs["residual"].grad.tolist() == [[-0.375, 8.375]]
    assert inputs["weight"].grad.tolist() == [-0.5, 0.5]
    assert inputs["bias"].grad.tolist() == [1.0, 1.0]


def test_reference_gradients():
    inputs = {name: t.detach().double().requires_grad_() for name, t in make(2, 3, 4).items()}
    assert torch.autograd.gradcheck(into(F64), tuple(inputs.values()))


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("D", [1, 2, 63, 130, 768])
def test_widths(isa, D, dtypes):
    check([make(5, 7, D, dtypes=dtypes) for _ in range(8)], dtypes[3])


@pytest.mark.parametrize("outputs", [(0,), (1,)], ids=["normalised", "sum"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_one_output_used(isa, outputs, dtypes):
    """Where only the sum is used, weight and bias have no gradient."""
    cases = [make(5, 7, 20, dtypes=dtypes) for _ in range(8)]
    if outputs == (1,):
        cases = [inputs | {name: inputs[name].detach() for name in ("weight", "bias")} for inputs in cases]
    check(cases, dtypes[3], outputs=outputs)


@pytest.mark.parametrize("shape", [(20,), (1, 20), (17, 20), (2, 3, 5, 20), (2500, 20)], ids=str)
@pytest.mark.parametrize("dtypes", FEW.values(), ids=FEW)
def test_rows(isa, shape, dtypes):
    check([make(*shape, dtypes=dtypes) for _ in range(4)], dtypes[3])


@pytest.mark.parametrize("dtypes", FEW.values(), ids=FEW)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(isa, layout, dtypes):
    check(
        [make(3, 9, 21, dtypes=dtypes) for _ in range(8)],
        dtypes[3],
        layout=lambda inputs: {name: lay_out(layout if t.dim() > 1 else sliced, t) for name, t in inputs.items()},
    )


def test_far_from_zero(isa):
    cases = [make(64, 63) for _ in range(4)]
    check([inputs | {"residual": (1e3 + 1e-2 * torch.randn(64, 63)).requires_grad_()} for inputs in cases])


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_statistics_are_those_of_the_sum_as_stored(isa, dtypes):
    """The same as the two steps, bit for bit."""
    x, residual, weight, bias = make(6, 50, dtypes=dtypes).values()
    y, total = ops.add_layer_norm(x, residual, weight, bias, EPS, dtypes[3])
    assert torch.equal(total, x + residual)
    assert torch.equal(y, ops.layer_norm(x + residual, weight, bias, EPS, dtypes[3]))


@pytest.mark.parametrize("dtypes", FEW.values(), ids=FEW)
def test_the_inputs_stay_as_they_were(isa, dtypes):
    inputs = make(6, 50, dtypes=dtypes)
    before = {name: t.detach().clone() for name, t in inputs.items()}
    y, total = ops.add_layer_norm(**inputs)
    torch.autograd.grad(y.sum() + total.sum(), list(inputs.values()))
    assert all(torch.equal(inputs[name], t) for name, t in before.items())


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5)], ids=str)
def test_no_rows(each_backend, shape):
    inputs = make(*shape)
    y, total = ops.add_layer_norm(**inputs)
    assert y.shape == total.shape == shape
    dx, dresidual, dweight, dbias = torch.autograd.grad(y.sum() + total.sum(), list(inputs.values()))
    assert dx.shape == dresidual.shape == shape
    assert dweight.tolist() == dbias.tolist() == [0] * 5


def test_default_dtype_is_that_of_the_sum(each_backend):
    for x_dtype, residual_dtype, expected in ((F32, F32, F32), (BF16, F32, F32), (BF16, BF16, BF16), (F16, BF16, F32)):
        y, total = ops.add_layer_norm(**make(2, 5, dtypes=(x_dtype, residual_dtype, F32)))
        assert y.dtype == total.dtype == expected


def test_float64_runs_eagerly():
    inputs = {name: t.double() for name, t in make(4, 9).items()}
    y, total = ops.add_layer_norm(**inputs)
    assert torch.equal(total, inputs["x"] + inputs["residual"])
    assert torch.equal(y, ops.layer_norm(total, inputs["weight"], inputs["bias"]))


def gradients(inputs: dict[str, Tensor], dy: Tensor, dtotal: Tensor) -> dict[str, Tensor]:
    leaves = {name: t for name, t in inputs.items() if t.requires_grad}
    return dict(zip(leaves, torch.autograd.grad(ops.add_layer_norm(**inputs), list(leaves.values()), (dy, dtotal)), strict=True))


@pytest.mark.parametrize("leaf", LEAVES)
def test_one_gradient_at_a_time(native, leaf):
    inputs, dy, dtotal = make(40, 9), torch.randn(40, 9), torch.randn(40, 9)
    alone = {name: t.detach().requires_grad_(name == leaf) for name, t in inputs.items()}
    assert torch.equal(gradients(alone, dy, dtotal)[leaf], gradients(inputs, dy, dtotal)[leaf])


def test_once_differentiable(native):
    assert_once_differentiable(lambda **inputs: torch.cat(ops.add_layer_norm(**inputs)), make(20, 9))


def test_deterministic(native):
    inputs, dy, dtotal = make(2000, 130), torch.randn(2000, 130), torch.randn(2000, 130)

    def run() -> dict[str, Tensor]:
        y, total = ops.add_layer_norm(**inputs)
        return {"y": y, "total": total} | gradients(inputs, dy, dtotal)

    assert_same_for_any_threads(run)


def test_opcheck(native):
    for dtypes in DTYPES.values():
        inputs = [t.detach() for t in make(2, 9, 5, dtypes=dtypes).values()]
        torch.library.opcheck(torch.ops.maefast.add_layer_norm_fwd.default, (*inputs, EPS, dtypes[3]))
