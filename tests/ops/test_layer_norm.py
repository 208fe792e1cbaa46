import pytest
import torch
from op_inputs import BF16, EPS, F16, F32, F64, NORM_DTYPES, Inputs
from specs import SPECS
from support import assert_equal
from torch import Tensor

from maefast import ops
from maefast.testing.errors import assert_close_to_float64

pytestmark = pytest.mark.usefixtures("poisoned")


def make(*shape: int, dtypes: tuple[torch.dtype, ...] = (F32, F32)) -> Inputs:
    return SPECS["layer_norm"].make(dtypes, shape)


def check(cases: list[Inputs]) -> None:
    SPECS["layer_norm"].check(cases, NORM_DTYPES["fp32"])


def by_hand(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    mean = x.mean(dim=-1, keepdim=True)
    var = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
    return (x - mean) / (var + eps) ** 0.5 * weight + bias


def test_by_paper_and_pencil(each_backend):
    """Mean 2, variance 1, and eps 3 makes the root 2."""
    x = torch.tensor([[1.0, 3.0]], requires_grad=True)
    weight, bias = torch.tensor([2.0, 4.0], requires_grad=True), torch.tensor([1.0, -1.0], requires_grad=True)
    y = ops.layer_norm(x, weight, bias, eps=3.0)
    assert y.tolist() == [[0.0, 1.0]]
    y.sum().backward()
    # g = dy * weight = [2, 4], its mean 3; mean of g times the normalised x, [-0.5, 0.5], is 0.5
    assert x.grad.tolist() == [[-0.375, 0.375]]
    assert weight.grad.tolist() == [-0.5, 0.5]
    assert bias.grad.tolist() == [1.0, 1.0]


def test_reference_is_the_definition():
    inputs = {name: t.double() for name, t in make(4, 3, 9).items()}
    torch.testing.assert_close(ops.layer_norm_ref(**inputs, eps=0.1, dtype=F64), by_hand(**inputs, eps=0.1))


def test_part_of_a_batch(isa):
    """Dense rows that are not equally far apart: a slice of the tokens, without the class token."""

    def behind_class_token(x: Tensor) -> Tensor:
        return torch.cat([torch.full_like(x[:, :1], torch.nan), x], dim=1)[:, 1:]

    cases = [make(4, 6, 33) for _ in range(8)]
    SPECS["layer_norm"].check(cases, NORM_DTYPES["fp32"], lambda t: behind_class_token(t) if t.dim() == 3 else t)


@pytest.mark.parametrize("mean", [1e3, -1e3])
@pytest.mark.parametrize("D", [5, 63, 768])
def test_far_from_zero(isa, D, mean):
    """A spread of 160 steps of fp32 around a mean of 1000."""
    cases = [make(64, D) for _ in range(4)]
    check([inputs | {"x": (mean + 1e-2 * torch.randn(64, D)).requires_grad_()} for inputs in cases])


@pytest.mark.parametrize("scale", [1e-12, 1e12, [1e4] + [1.0] * 62], ids=["small", "large", "an outlier in front"])
def test_other_scales(isa, scale):
    """The statistics start from the first value; it may be far from the others."""
    x = torch.tensor(scale) * torch.randn(4, 16, 63)
    check([make(16, 63) | {"x": part.requires_grad_()} for part in x.unbind()])


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("D", [1, 3, 63, 768])
def test_constant_rows(isa, D, dtype):
    inputs = make(1, D)
    x = torch.tensor([[0.0], [1000.1], [-3e-3], [0.1]]).to(dtype).expand(4, D)
    y = ops.layer_norm(x, inputs["weight"], inputs["bias"], EPS, F32)
    assert torch.equal(y, inputs["bias"].expand(4, D))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_stays_alone(isa, value):
    inputs = make(3, 40)
    spoilt = inputs["x"].detach().clone()
    spoilt[1, 17] = value
    y, expected = (ops.layer_norm(x, inputs["weight"], inputs["bias"]) for x in (spoilt, inputs["x"]))
    assert y[1].isnan().all()
    assert torch.equal(y[::2], expected[::2])


def test_default_dtype_is_that_of_x(each_backend):
    for dtype in (F32, BF16, F16):
        inputs = make(2, 5, dtypes=(dtype, F32))
        assert_equal(ops.layer_norm(**inputs), ops.layer_norm(**inputs, dtype=dtype))


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, dresidual=None, y_dtype=None, cast_dtype=None, with_dx_sum=False
) -> list[Tensor]:
    y, center, rstd = torch.ops.maefast.layer_norm_fwd(x, weight, bias, EPS, dy.dtype)
    args = (dy, dresidual, x, weight, bias, center, rstd, y_dtype, cast_dtype, with_dx_sum)
    return [y, *torch.ops.maefast.layer_norm_bwd(*args)]


@pytest.mark.parametrize("dtypes", NORM_DTYPES.values(), ids=NORM_DTYPES)
@pytest.mark.parametrize("D", [1, 63, 512])
def test_backward_gives_the_forward_output_again_bit_for_bit(isa, D, dtypes):
    inputs = {name: t.detach() for name, t in make(70, D, dtypes=dtypes).items()}
    dy = torch.randn(70, D).to(dtypes[2])
    y, *grads, none, no_cast, no_sum = backward(dy, **inputs)
    assert none.shape == no_cast.shape == no_sum.shape == (0,)
    for residual in (None, torch.randn(70, D)):
        assert_equal(backward(dy, **inputs, dresidual=residual, y_dtype=dtypes[2])[4], y)
    assert_equal(backward(dy, **inputs, y_dtype=dtypes[2])[1:4], grads)


@pytest.mark.parametrize("cast", [F32, BF16, F16])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_backward_rounds_dx_once_more(isa, dtype, cast):
    """The second dx is rounded once, from the same fp32 sum as dx."""
    inputs = {name: t.detach() for name, t in make(70, 63, dtypes=(dtype, F32)).items()}
    dy, dresidual = torch.randn(70, 63), torch.randn(70, 63).to(dtype)
    _, dx, _, _, _, dx_cast, _ = backward(dy, **inputs, dresidual=dresidual, cast_dtype=cast)
    _, wide, *_ = backward(dy, **inputs | {"x": inputs["x"].float()}, dresidual=dresidual)
    assert_equal((dx, dx_cast), (wide.to(dtype), wide.to(cast)))


@pytest.mark.parametrize("residual_dtype", [F32, BF16, F16])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_backward_adds_the_gradient_of_the_residual_path(isa, dtype, residual_dtype):
    inputs = {name: t.detach() for name, t in make(70, 63, dtypes=(dtype, F32)).items()}
    dy, dresidual = torch.randn(70, 63), torch.randn(70, 63).to(residual_dtype)
    _, alone, *grads = backward(dy, **inputs | {"x": inputs["x"].float()})
    assert_equal(backward(dy, **inputs, dresidual=dresidual)[1:4], [(alone + dresidual).to(dtype), *grads[:2]])


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("rows", [1, 70, 700])
def test_backward_sums_the_columns_of_dx(isa, rows, dtype):
    """The gradient of the bias before the norm, of dx before it is rounded to the dtype of x."""
    inputs = {name: t.detach() for name, t in make(rows, 63, dtypes=(dtype, F32)).items()}
    dy, dresidual = torch.randn(rows, 63).to(dtype), torch.randn(rows, 63)
    *_, total = backward(dy, **inputs, dresidual=dresidual, with_dx_sum=True)
    _, dx, *_ = backward(dy, **inputs | {"x": inputs["x"].float()}, dresidual=dresidual)
    assert total.dtype == F32
    assert_close_to_float64("dx_sum", total, dx.sum(dim=0), dx.double().sum(dim=0))


@pytest.mark.huge
def test_backward_of_more_than_2_31_elements(native):
    rows, D = 2**18 + 3, 8192
    x = torch.tensor([1.0, -1.0] * (D // 2)).bfloat16().expand(rows, D)
    dy = torch.randint(-8, 8, (1, D)).bfloat16()
    weight, bias, one = torch.ones(D), torch.zeros(D), torch.ones(rows)
    dx, dweight, dbias, *_ = torch.ops.maefast.layer_norm_bwd(dy.expand(rows, D), None, x, weight, bias, one * 0, one, None, None)
    assert dx.numel() > 2**31
    for row in (1, rows // 2, rows - 1):
        assert torch.equal(dx[row], dx[0])
    assert torch.equal(dbias, dy[0].float() * rows)  # whole numbers below 2^24
    assert torch.equal(dweight, dy[0].float() * x[0].float() * rows)
