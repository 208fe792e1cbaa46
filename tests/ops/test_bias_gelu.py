import math

import pytest
import torch
from support import LAYOUTS, assert_once_differentiable, assert_same_for_any_threads, check_op, forward_backward, lay_out, sliced
from torch import Tensor

from maefast import ops
from maefast.testing.errors import assert_close_to_float64

pytestmark = pytest.mark.usefixtures("poisoned")

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = {  # x, bias
    "fp32": (F32, F32),
    "bf16": (BF16, BF16),
    "fp16": (F16, F16),
    "fp32_bias": (BF16, F32),
    "bf16_bias": (F32, BF16),
    "no_bias": (F32, None),
    "no_bias_bf16": (BF16, None),
}
FEW = {name: DTYPES[name] for name in ("fp32", "bf16", "no_bias")}


def make(*shape: int, dtypes: tuple[torch.dtype | None, ...] = DTYPES["fp32"]) -> dict[str, Tensor]:
    inputs = {"x": (2 * torch.randn(shape)).to(dtypes[0]).requires_grad_()}
    return inputs if dtypes[1] is None else inputs | {"bias": torch.randn(shape[-1]).to(dtypes[1]).requires_grad_()}


def incoming(out: Tensor) -> Tensor:
    """Gradients that bf16 holds exactly, so that their rounding hides nothing."""
    return torch.randn(out.shape).bfloat16()


def check(cases: list[dict[str, Tensor]], layout=lambda inputs: inputs, dy_layout=lambda dy: dy) -> None:
    def exact(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.double() for name, t in inputs.items()}

    check_op(ops.bias_gelu, cases, exact, lambda out: dy_layout(incoming(out)), layout)


def test_reference_is_the_definition():
    x, bias = make(50, 5).values()
    for value, y in zip((x.double() + bias.double()).flatten(), ops.bias_gelu_ref(x.double(), bias).flatten(), strict=True):
        assert y.item() == pytest.approx(0.5 * value.item() * math.erfc(-value.item() / math.sqrt(2)), rel=1e-12, abs=1e-15)


def test_reference_gradients():
    inputs = {name: t.detach().double().requires_grad_() for name, t in make(2, 3, 4).items()}
    assert torch.autograd.gradcheck(ops.bias_gelu, tuple(inputs.values()))


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("D", [1, 2, 15, 63, 130, 3072])
def test_widths(isa, D, dtypes):
    check([make(3, 7, D, dtypes=dtypes) for _ in range(8)])


@pytest.mark.parametrize("shape", [(20,), (1, 20), (17, 20), (2, 3, 5, 20), (2500, 20), (40_000, 3)], ids=str)
@pytest.mark.parametrize("dtypes", FEW.values(), ids=FEW)
def test_rows(isa, shape, dtypes):
    check([make(*shape, dtypes=dtypes) for _ in range(4)])


@pytest.mark.parametrize("dtypes", FEW.values(), ids=FEW)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(isa, layout, dtypes):
    check(
        [make(3, 9, 21, dtypes=dtypes) for _ in range(8)],
        layout=lambda inputs: {name: lay_out(layout if t.dim() > 1 else sliced, t) for name, t in inputs.items()},
        dy_layout=layout,
    )


@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_zero_strides(isa, dims):
    def expanded(t: Tensor) -> Tensor:
        shape = [1 if dim in dims else size for dim, size in enumerate(t.shape)]
        return t.detach()[tuple(slice(size) for size in shape)].expand(t.shape).requires_grad_(t.requires_grad)

    cases = [make(3, 9, 21) for _ in range(20)]
    check([inputs | {"x": expanded(inputs["x"])} for inputs in cases], dy_layout=expanded)


RANGES = {
    "all": (-14.0, 14.0),
    "middle": (-1.0, 1.0),
    "around_zero": (-1e-3, 1e-3),
    "tiny": (-1e-20, 1e-20),
    "left": (-6.0, -4.0),
    "right": (4.0, 6.0),
    "minimum": (-0.8, -0.7),  # where the slope is zero
}


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("limits", RANGES.values(), ids=RANGES)
def test_everywhere(isa, limits, dtype):
    """Each part of the curve held to the rule on its own, so that the large values do not hide the small ones."""
    x = torch.linspace(*limits, 20_000).to(dtype).requires_grad_()
    check([{"x": x}])


def test_the_tail_keeps_its_digits(isa):
    """1 + erf loses them: at -6 half the digits of fp32, and at -8 nothing is left."""
    x = torch.linspace(-13.0, -3.0, 5000, dtype=F64).float().requires_grad_()
    y = ops.bias_gelu(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    wide = x.detach().double()
    cdf, density = torch.special.erfc(-wide / 2**0.5) / 2, torch.exp(-(wide**2) / 2) / (2 * math.pi) ** 0.5
    assert ((y.double() / (wide * cdf) - 1).abs() < 2e-5).all()
    assert ((dx.double() / (cdf + wide * density) - 1).abs() < 2e-5).all()


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("D", [1, 40])
def test_limits(isa, D, dtype):
    far = [torch.inf, -torch.inf, 60_000.0, -60_000.0, 20.0, -20.0, 0.0, -0.0]
    x = torch.tensor(far).to(dtype)[:, None].expand(-1, D).contiguous().requires_grad_()
    y = ops.bias_gelu(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, x.detach().clamp(min=0))
    assert torch.equal(dx, torch.tensor([1.0, 0, 1, 0, 1, 0, 0.5, 0.5]).to(dtype)[:, None].expand(-1, D))


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7FFFFFFF, -1, -0x400000], ids=hex)
def test_nan_stays(isa, bits):
    x = torch.tensor([bits] * 40, dtype=torch.int32).view(F32).requires_grad_()
    y = ops.bias_gelu(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.isnan().all()
    assert dx.isnan().all()


def test_the_sum_is_not_rounded(isa):
    """1 + 2^-9 is no bf16 value."""
    x, bias = torch.ones(3, 5).bfloat16(), torch.full((5,), 2.0**-9)
    assert torch.equal(ops.bias_gelu(x * 512, bias), x * 512)
    exact = torch.nn.functional.gelu(torch.tensor(-1 + 2.0**-9, dtype=F64)).expand(3, 5)
    assert_close_to_float64("y", ops.bias_gelu(-x, bias).float(), exact.bfloat16(), exact)
    assert not torch.equal(ops.bias_gelu(-x, bias), ops.bias_gelu(-x))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5)], ids=str)
def test_no_rows(each_backend, shape):
    inputs = make(*shape)
    y = ops.bias_gelu(**inputs)
    assert y.shape == shape
    dx, dbias = torch.autograd.grad(y.sum(), list(inputs.values()))
    assert dx.shape == shape
    assert dbias.tolist() == [0] * 5


def test_float64_runs_eagerly():
    inputs = {name: t.double() for name, t in make(4, 9).items()}
    assert torch.equal(ops.bias_gelu(**inputs), torch.nn.functional.gelu(inputs["x"] + inputs["bias"]))


@pytest.mark.parametrize("leaf", ["x", "bias"])
def test_one_gradient_at_a_time(native, leaf):
    inputs, dy = make(40, 9), torch.randn(40, 9)
    expected = forward_backward(ops.bias_gelu, inputs, dy)[f"d_{leaf}"]
    alone = {name: t.detach().requires_grad_(name == leaf) for name, t in inputs.items()}
    assert torch.equal(forward_backward(ops.bias_gelu, alone, dy)[f"d_{leaf}"], expected)


def test_once_differentiable(native):
    assert_once_differentiable(ops.bias_gelu, make(20, 9))


def test_deterministic(native):
    inputs, dy = make(2000, 130), torch.randn(2000, 130)
    assert_same_for_any_threads(lambda: forward_backward(ops.bias_gelu, inputs, dy))


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("D", [1, 63, 512])
def test_backward_gives_the_forward_output_again_bit_for_bit(isa, D, dtypes):
    inputs = {name: t.detach() for name, t in make(70, D, dtypes=dtypes).items()}
    dy, bias = torch.randn(70, D).to(dtypes[0]), inputs.get("bias")
    y = torch.ops.maefast.bias_gelu_fwd(inputs["x"], bias)
    dx, dbias, none = torch.ops.maefast.bias_gelu_bwd(dy, inputs["x"], bias, False)
    dx_too, dbias_too, again = torch.ops.maefast.bias_gelu_bwd(dy, inputs["x"], bias, True)
    assert torch.equal(again, y)
    assert torch.equal(dx_too, dx)
    assert torch.equal(dbias_too, dbias)
    assert none.shape == (0,)
    assert dbias.shape == (0 if bias is None else D,)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("rows", [1, 70, 700])
def test_backward_sums_the_columns_of_dx_without_a_bias(isa, rows, dtype):
    """The gradient of the bias that x holds already."""
    x, dy = torch.randn(rows, 63).to(dtype), torch.randn(rows, 63).to(dtype)
    dx, total, _ = torch.ops.maefast.bias_gelu_bwd(dy, x, None, False, True)
    assert torch.equal(dx, torch.ops.maefast.bias_gelu_bwd(dy, x, None, False)[0])

    def plain(wide: torch.dtype) -> Tensor:
        leaf = x.to(wide).requires_grad_()
        (grad,) = torch.autograd.grad(ops.bias_gelu_ref(leaf, None), leaf, dy.to(wide))
        return grad.sum(dim=0)

    assert total.dtype == F32
    assert_close_to_float64("dx_sum", total, plain(dtype).to(F32), plain(F64))


@pytest.mark.huge
def test_forward_of_more_than_2_31_elements(native):
    rows, D = 2**18 + 3, 8192
    x = make(1, D, dtypes=(BF16, None))["x"].detach()
    expected = ops.bias_gelu(x)[0]
    y = ops.bias_gelu(x.expand(rows, D))
    assert y.numel() > 2**31
    for row in (0, rows // 2, rows - 1):
        assert torch.equal(y[row], expected)


@pytest.mark.huge
def test_backward_of_more_than_2_31_elements(native):
    """At zero the slope is one half."""
    rows, D = 2**18 + 3, 8192
    x, dy = torch.zeros(1, D).bfloat16(), torch.randint(-8, 8, (1, D)).bfloat16()
    dx, dbias, _ = torch.ops.maefast.bias_gelu_bwd(dy.expand(rows, D), x.expand(rows, D), torch.zeros(D), False)
    assert dx.numel() > 2**31
    for row in (0, rows // 2, rows - 1):
        assert torch.equal(dx[row], dy[0] / 2)
    assert torch.equal(dbias, dy[0].float() / 2 * rows)  # multiples of one half below 2^23


def test_opcheck(native):
    x, bias = (t.detach() for t in make(2, 9, 5).values())
    for b in (bias, bias.bfloat16(), None):
        torch.library.opcheck(torch.ops.maefast.bias_gelu_fwd.default, (x, b))
        for with_y in (False, True):
            torch.library.opcheck(torch.ops.maefast.bias_gelu_bwd.default, (torch.randn(2, 9, 5), x, b, with_y))
