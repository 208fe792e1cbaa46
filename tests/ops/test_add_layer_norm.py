import pytest
import torch
from op_inputs import ADD_NORM_DTYPES, BF16, EPS, F16, F32, Inputs
from specs import NORM_FEW, SPECS
from support import assert_equal

from maefast import ops

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = ADD_NORM_DTYPES


def make(*shape: int, dtypes: tuple[torch.dtype, ...] = DTYPES["fp32"]) -> Inputs:
    return SPECS["add_layer_norm"].make(dtypes, shape)


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


@pytest.mark.parametrize("outputs", [(0,), (1,)], ids=["normalised", "sum"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_one_output_used(isa, outputs, dtypes):
    """Where only the sum is used, weight and bias have no gradient."""
    cases = [make(5, 7, 20, dtypes=dtypes) for _ in range(8)]
    if outputs == (1,):
        cases = [inputs | {name: inputs[name].detach() for name in ("weight", "bias")} for inputs in cases]
    SPECS["add_layer_norm"].check(cases, dtypes, outputs=outputs)


def test_far_from_zero(isa):
    cases = [make(64, 63) for _ in range(4)]
    cases = [inputs | {"residual": (1e3 + 1e-2 * torch.randn(64, 63)).requires_grad_()} for inputs in cases]
    SPECS["add_layer_norm"].check(cases, DTYPES["fp32"])


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_statistics_are_those_of_the_sum_as_stored(isa, dtypes):
    x, residual, weight, bias = make(6, 50, dtypes=dtypes).values()
    y, total = ops.add_layer_norm(x, residual, weight, bias, EPS, dtypes[3])
    assert_equal((y, total), (ops.layer_norm(x + residual, weight, bias, EPS, dtypes[3]), x + residual))


@pytest.mark.parametrize("dtypes", [DTYPES[name] for name in NORM_FEW], ids=NORM_FEW)
def test_the_inputs_stay_as_they_were(isa, dtypes):
    inputs = make(6, 50, dtypes=dtypes)
    before = {name: t.detach().clone() for name, t in inputs.items()}
    y, total = ops.add_layer_norm(**inputs)
    torch.autograd.grad(y.sum() + total.sum(), list(inputs.values()))
    assert_equal(inputs, before)


def test_default_dtype_is_that_of_the_sum(each_backend):
    for x_dtype, residual_dtype, expected in ((F32, F32, F32), (BF16, F32, F32), (BF16, BF16, BF16), (F16, BF16, F32)):
        y, total = ops.add_layer_norm(**make(2, 5, dtypes=(x_dtype, residual_dtype, F32)))
        assert y.dtype == total.dtype == expected


def test_reference_is_the_definition():
    x, residual, weight, bias = (t.double() for t in make(4, 9).values())
    got = ops.add_layer_norm_ref(x, residual, weight, bias, EPS, x.dtype)
    assert_equal(got, (ops.layer_norm_ref(x + residual, weight, bias, EPS, x.dtype), x + residual))
