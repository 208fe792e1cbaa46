"""The block as an op; tests/test_blocks.py holds modules to the same results."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from op_inputs import BF16, EPS, F32, HEADS, Inputs
from op_inputs import BLOCK_WIDTH as D
from specs import SPECS
from support import TRANSFORMER_BLOCK, Calls, assert_equal, small_mae
from torch import Tensor

import maefast
from maefast import ops
from maefast.blocks import Route
from maefast.ops import BlockWeights

pytestmark = pytest.mark.usefixtures("poisoned")

SPEC = SPECS["transformer_block"]
block = SPEC.op()


def make(pending: bool = True) -> Inputs:
    return SPEC.make((F32,), pending=pending)


def by_hand(x: Tensor, pending: Tensor | None = None, **w: Tensor) -> tuple[Tensor, Tensor]:
    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * w[f"{name}_weight"] + w[f"{name}_bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}_weight"].T + w[f"{name}_bias"]

    x = x if pending is None else x + pending
    q, k, v = linear(norm(x, "norm1"), "qkv").unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / (D // HEADS) ** 0.5).softmax(dim=-1)
    x = x + linear((weights @ v).transpose(1, 2).flatten(2), "proj")
    hidden = linear(norm(x, "norm2"), "fc1")
    return x, linear(hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)), "fc2")


@pytest.mark.parametrize("pending", [True, False], ids=["pending", "alone"])
def test_reference_is_the_definition(pending):
    inputs = SPEC.exact(make(pending=pending))
    with maefast.backend("eager"):
        assert torch.allclose(block(**inputs), torch.cat(by_hand(**inputs)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("T", [1, 50, 65, 197])
def test_lengths(native, T):
    SPEC.check([SPEC.make((F32,), T=T) for _ in range(4)], (F32,))


@pytest.mark.parametrize("stream", [F32, BF16], ids=str)
@pytest.mark.parametrize("pending", [F32, BF16], ids=str)
def test_dtypes_under_autocast(native, stream, pending):
    """The stream has the promoted dtype of its summands, the branch that of products."""
    inputs = make()
    inputs |= {name: inputs[name].detach().to(d).requires_grad_() for name, d in (("x", stream), ("pending", pending))}
    with torch.autocast("cpu", BF16):
        out = ops.transformer_block(**split(inputs), num_heads=HEADS)
    assert [t.dtype for t in out] == [torch.promote_types(stream, pending), BF16]
    grads = torch.autograd.grad(out, list(inputs.values()), [torch.ones_like(t) for t in out])
    assert [grad.dtype for grad in grads] == [t.dtype for t in inputs.values()]


def split(inputs: Inputs) -> dict[str, object]:
    weights = {name: t for name, t in inputs.items() if name in BlockWeights._fields}
    return {"x": inputs["x"], "pending": inputs.get("pending"), "weights": BlockWeights(**weights)}


@pytest.mark.parametrize("unused", [0, 1], ids=["stream", "branch"])
def test_one_of_the_results_is_enough(native, unused):
    """The gradient of the other is zero."""
    inputs = make()
    leaves = list(inputs.values())
    out = ops.transformer_block(**split(inputs), num_heads=HEADS, eps=EPS)
    got, expected = (
        torch.autograd.grad(results[1 - unused].square().sum(), leaves, materialize_grads=True)
        for results in (out, by_hand(**inputs))
    )
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("autocast", [None, BF16], ids=["fp32", "autocast"])
def test_what_is_kept_is_what_would_be_recomputed(native, monkeypatch, autocast):
    """A GPU keeps the outputs of norms and GELU; the gradients have the same bits."""
    inputs, dy = make(), torch.randn(4, 9, D)

    def gradients() -> list[Tensor]:
        with torch.autocast("cpu", BF16, enabled=autocast is not None):
            out = block(**inputs)
        return torch.autograd.grad(out, list(inputs.values()), dy)

    expected = gradients()
    monkeypatch.setattr(TRANSFORMER_BLOCK, "KEEPING", ("cpu",))
    assert_equal(gradients(), expected)


@pytest.fixture
def gelu_in_products(monkeypatch) -> Iterator[None]:
    """Products with GELU in their epilogues, as on a GPU; plain torch stands in for the kernels."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.nn.functional.linear(x, weight, bias)
        return torch.nn.functional.gelu(hidden), hidden

    def backward(dy: Tensor, weight: Tensor, hidden: Tensor, with_sum: bool = False) -> tuple[Tensor, Tensor]:
        dhidden = torch.ops.aten.gelu_backward(dy @ weight, hidden)
        return dhidden, dhidden.float().flatten(0, -2).sum(0) if with_sum else dhidden.new_empty(0)

    library = torch.library.Library("maefast", "IMPL")
    library.impl("linear_gelu_fwd", forward, "CPU")
    library.impl("linear_gelu_bwd", backward, "CPU")
    monkeypatch.setattr(TRANSFORMER_BLOCK, "KEEPING", ("cpu",))
    monkeypatch.setattr(TRANSFORMER_BLOCK, "is_fused", lambda kind, *product: kind.startswith("linear_gelu"))
    yield
    library._destroy()


def test_gelu_in_the_epilogues_of_products(native, gelu_in_products):
    with Calls() as calls:
        block(**make()).sum().backward()
    assert {"linear_gelu_fwd", "linear_gelu_bwd"} <= set(calls.names)
    assert not {"bias_gelu_fwd", "bias_gelu_bwd"} & set(calls.names)
    SPEC.check([make() for _ in range(8)], (F32,))


def test_without_gradients_the_results_are_within_the_rule(native):
    with torch.no_grad():
        SPEC.check([{name: t.detach() for name, t in make().items()} for _ in range(8)], (F32,))


@pytest.mark.parametrize("autocast", [None, BF16], ids=["fp32", "autocast"])
def test_under_compile(native, fresh_dynamo, autocast):
    inputs = make()

    def run(function) -> list[Tensor]:
        with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
            out = function(**split(inputs), num_heads=HEADS)
        return [*out, *torch.autograd.grad(out, list(inputs.values()), [torch.ones_like(t) for t in out])]

    compiled = torch.compile(ops.transformer_block, fullgraph=True, backend="aot_eager")
    assert_equal(run(compiled), run(ops.transformer_block))


@pytest.fixture(params=["recomputed", "kept", "epilogues"])
def each_plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What backward recomputes, what a GPU keeps, and products with GELU in their epilogues."""
    if request.param == "kept":
        monkeypatch.setattr(TRANSFORMER_BLOCK, "KEEPING", ("cpu",))
    elif request.param == "epilogues":
        request.getfixturevalue("gelu_in_products")


@pytest.mark.parametrize("pending", [True, False], ids=["pending", "alone"])
def test_opcheck(native, fresh_dynamo, each_plan, pending):
    """Through AOTAutograd with dynamic shapes, as an op that is made of others."""
    library = torch.library.Library("maefast_opcheck", "FRAGMENT")
    try:
        library.define("block(Tensor x, Tensor? pending, Tensor[] weights, int num_heads) -> (Tensor, Tensor)")

        def run(x: Tensor, pending: Tensor | None, weights: list[Tensor], num_heads: int) -> tuple[Tensor, Tensor]:
            return ops.transformer_block(x, pending, BlockWeights(*weights), num_heads)

        library.impl("block", run, "CompositeImplicitAutograd")
        given = split(make(pending=pending))
        args = (given["x"], given["pending"], list(given["weights"]), HEADS)
        torch.library.opcheck(torch.ops.maefast_opcheck.block.default, args)
    finally:
        library._destroy()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.ones(2, 9, 25)}, ValueError, r"x must be \(N, T, D\) with D a multiple of num_heads = 3; .*\(2, 9, 25\)"),
        ({"x": torch.ones(9, 24)}, ValueError, r"x must be \(N, T, D\)"),
        ({"pending": torch.ones(2, 8, 24)}, ValueError, r"pending must have the shape of x, \(2, 9, 24\); .*\(2, 8, 24\)"),
        ({"qkv_weight": torch.ones(48, 24)}, ValueError, r"qkv_weight must be \(72, 24\); its shape is \(48, 24\)"),
        ({"fc1_bias": torch.ones(41)}, ValueError, r"fc1_weight must be \(41, 24\); its shape is \(40, 24\)"),
        ({"proj_weight": torch.ones(24, 24).bfloat16()}, TypeError, "proj_weight must be float32; it is bfloat16"),
        ({"norm1_bias": torch.ones(24, dtype=torch.int64)}, TypeError, "norm1_bias must be floating-point; it is int64"),
        ({"fc2_bias": torch.ones(24, device="meta")}, ValueError, "fc2_bias must be on the device of x, cpu; it is on meta"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input(each_backend, changed, error, message):
    with pytest.raises(error, match=message):
        ops.transformer_block(**split(make() | changed), num_heads=HEADS)


def test_a_request_that_cannot_run_raises_with_the_reason(native):
    with maefast.backend("native"), pytest.raises(RuntimeError, match=r"transformer_block cannot run .*'native'.*float64"):
        ops.transformer_block(**split(SPEC.exact(make())), num_heads=HEADS)


def test_each_block_of_a_model_is_one_op(native):
    """The branch of a block is added by the norm of the next, the last by the norm of the stack."""
    model = small_mae()
    x = torch.randn(2, 7, 32)
    with torch.no_grad():
        expected = x
        for block in model.blocks:
            assert block.route(x.device, x.dtype, tokens=7)[0] is Route.FUSED
            expected = block(expected)
        torch.testing.assert_close(maefast.blocks.run_blocks(model.blocks, model.norm, x), model.norm(expected))
        assert torch.equal(maefast.blocks.run_blocks(model.blocks, None, x), expected)
