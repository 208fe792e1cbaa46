"""Blocks: every route against float64, and which one is taken."""

import copy
import io

import block_cases
import pytest
import torch
from block_cases import HEADS, MODES, D, T, is_fused, make_block, plain, random_ids, run, samples, through_modules
from support import BATCHES, NATIVE, Batch, Calls, Results, assert_results
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import maefast
from maefast import reference
from maefast.blocks import Block, Route


def through_ops(block: Block) -> Block:
    """Return the block with an attention that is not maefast's."""
    block = copy.deepcopy(block)
    block.attn.backend = "sdpa"
    return block


WAYS = {Route.FUSED: lambda block: block, Route.OPS: through_ops, Route.MODULES: through_modules}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("route", Route, ids=lambda route: route.name)
def test_every_route_against_float64(native, route, mode):
    dtype, cast = mode
    block = make_block(dtype)
    mine = WAYS[route](block)
    with block_cases.autocast(cast):
        assert mine.route(torch.device("cpu"), dtype, T)[0] is route
    block_cases.assert_like_plain(mine, plain(block), samples(BATCHES, dtype), cast)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_each_instruction_set(isa, mode):
    dtype, cast = mode
    block = make_block(dtype)
    block_cases.assert_like_plain(block, plain(block), samples(BATCHES, dtype), cast)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_inference(mode):
    """Without gradients GELU follows its product at once; the numbers hold, and nothing is kept."""
    dtype, cast = mode
    block = make_block(dtype)
    eager, exact = plain(block), plain(block).double()
    for context in (torch.no_grad, torch.inference_mode):
        results: list[Batch] = []
        with context():
            for x, _ in samples(8, dtype):
                with block_cases.autocast(cast):
                    y, expected = block(x), eager(x)
                assert not y.requires_grad
                results.append(({"y": y}, [{"y": expected}], {"y": exact(x.double())}))
        assert_results(results)


def test_the_fused_path_is_taken(native):
    """One Function for a block in training, and what it recomputes in backward."""
    block = make_block()
    with Calls() as calls, maefast.backend("native"):
        y = block(torch.randn(2, T, D))
        forward = list(calls.names)
        assert block_cases.fused_into(y)
        y.sum().backward()
    assert forward[::2] == ["layer_norm_fwd", "attention_fwd", "add_layer_norm_fwd", "bias_gelu_fwd"]
    assert forward[1::2] == 4 * ["linear_fwd"]
    backward = calls.names[len(forward) :]
    assert backward.count("linear_fwd") == 8
    others = [name for name in backward if name != "linear_fwd"]
    assert others == ["bias_gelu_bwd", "layer_norm_bwd", "attention_bwd", "layer_norm_bwd"]


def test_x_of_another_dtype_than_the_weights_is_refused(native):
    """By torch, as in the module path: nothing is cast in silence."""
    for block in (make_block(torch.bfloat16), through_modules(make_block(torch.bfloat16))):
        with pytest.raises(RuntimeError, match="dtype"):
            block(torch.randn(2, T, D))


def test_norms_in_fp32_beside_bf16(native):
    block = make_block(torch.bfloat16)
    block.norm1.float()
    block.norm2.float()
    eager, exact = copy.deepcopy(through_modules(block)), plain(make_block()).double()
    exact.load_state_dict(block.state_dict())
    block_cases.assert_like_plain(block, eager, samples(BATCHES, torch.bfloat16), exact=exact)


@pytest.fixture
def trained() -> tuple[Block, Tensor, Tensor, Results]:
    """A block, x and dy, and what a step on them gives."""
    block = make_block()
    ((x, dy),) = samples(1)
    return block, x, dy, run(block, x, dy)


def assert_same(got: Results, expected: Results) -> None:
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("frozen", ["attn", "mlp.fc1", "norm", "bias", "weight", "norm2.weight"])
def test_frozen_parameters(trained, frozen):
    """Have no gradient; the others have the bits that they have beside them."""
    block, x, dy, expected = trained
    for name, p in block.named_parameters():
        p.requires_grad_(frozen not in name)
    got = run(block, x, dy)
    assert {name for name in expected if frozen in name} == expected.keys() - got.keys()
    assert_same(got, expected)


def test_a_frozen_block_passes_the_gradient_on(trained):
    block, x, dy, expected = trained
    got = run(block.requires_grad_(False), x, dy)
    assert got.keys() == {"y", "x"}
    assert_same(got, expected)


def test_gradients_without_one_for_x(trained):
    """The first block of an encoder whose embedding is frozen."""
    block, x, dy, expected = trained
    block.zero_grad()
    block(x).backward(dy)
    assert x.grad is None
    assert_same({name: p.grad for name, p in block.named_parameters()}, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(trained, use_reentrant):
    block, x, dy, expected = trained

    class Checkpointed(nn.Module):
        def __init__(self, block: nn.Module):
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=use_reentrant)

    assert_same({name.removeprefix("block."): value for name, value in run(Checkpointed(block), x, dy).items()}, expected)


def test_copies_are_the_same_block(trained):
    block, x, dy, expected = trained
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    for other in (copy.deepcopy(block), torch.load(file, weights_only=False)):
        assert is_fused(other) == NATIVE
        assert_same(run(other, x, dy), expected)


def test_functional_call():
    """With parameters from elsewhere, whose gradients go there."""
    block, other = make_block(), make_block(seed=1)
    ((x, dy),) = samples(1)
    expected = run(other, x, dy)
    parameters = {name: p.detach().requires_grad_() for name, p in other.named_parameters()}
    y = torch.func.functional_call(block, parameters, (x,))
    assert_same(dict(zip(parameters, torch.autograd.grad(y, list(parameters.values()), dy), strict=True)) | {"y": y}, expected)
    assert all(p.grad is None for p in block.parameters())


def test_double_backward_raises(native):
    block, x = make_block(), torch.randn(2, T, D, requires_grad=True)
    (dx,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_backward_twice():
    block, x = make_block(), torch.randn(2, T, D, requires_grad=True)
    loss = block(x).square().sum()
    leaves = [x, *block.parameters()]
    for a, b in zip(torch.autograd.grad(loss, leaves, retain_graph=True), torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, T, D), (2, 0, D)], ids=str)
def test_nothing_to_do(each_backend, shape):
    block, x = make_block(), torch.randn(shape, requires_grad=True)
    y = block(x)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    assert all(p.grad is not None and not p.grad.any() for p in block.parameters())


@pytest.mark.parametrize("grad_layout", [lambda y: y.sum(), lambda y: y.transpose(1, 2).contiguous().square().sum()])
def test_incoming_gradients_of_any_layout(grad_layout):
    """Gradients of a sum have strides of zero, others are transposed."""
    block = make_block()
    x = torch.randn(3, T, D, requires_grad=True)
    y = block(x)
    (dy,) = torch.autograd.grad(grad_layout(y), y, retain_graph=True)
    got = torch.autograd.grad(grad_layout(y), [x, *block.parameters()])
    for (name, value), grad in zip(list(run(block, x, dy.contiguous()).items())[1:], got, strict=True):
        torch.testing.assert_close(grad, value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("layout", [lambda x: x[:, ::2], lambda x: x.transpose(0, 1), lambda x: x[:1].expand(4, -1, -1)])
def test_x_of_any_layout(layout):
    block, x = make_block(), layout(torch.randn(4, 2 * T, D))
    assert not x.is_contiguous()
    assert torch.equal(block(x), block(x.contiguous()))


def test_x_is_not_changed():
    block, x = make_block(), torch.randn(2, T, D)
    before = x.clone()
    block(x)
    with torch.no_grad():
        block(x)
    assert torch.equal(x, before)


def test_parameters_and_their_initial_values_are_those_of_the_reference():
    torch.manual_seed(3)
    block, after = Block(D, HEADS, 4.0, nn.LayerNorm), torch.rand(2)
    torch.manual_seed(3)
    expected = reference.Block(D, HEADS, 4.0, nn.LayerNorm, "sdpa")
    assert torch.equal(torch.rand(2), after)
    assert [name for name, _ in block.named_parameters()] == [name for name, _ in expected.named_parameters()]
    assert_same(block.state_dict(), expected.state_dict())
    assert isinstance(block.attn.qkv, nn.Linear)


def test_a_request_for_native_that_cannot_run_raises(native):
    wide = Block(130, 1, 1.0, nn.LayerNorm)
    x = torch.randn(1, 3, 130)
    assert wide(x).shape == x.shape
    with maefast.backend("native"):
        with pytest.raises(RuntimeError, match=r"attention cannot run.*'native'.*130 wide"):
            wide(x)
        with pytest.raises(RuntimeError, match=r"cannot run.*'native'.*float64"):
            make_block(torch.float64)(torch.randn(2, T, D).double())


def test_eager_blocks_run_no_native_op():
    with Calls() as calls, maefast.backend("eager"):
        block = make_block()
        block(torch.randn(2, T, D)).sum().backward()
        block(torch.randn(3, T, D), random_ids(4)).sum().backward()
    assert calls.names == []
