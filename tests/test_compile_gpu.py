"""torch.compile and the block's route on a GPU, by fake CUDA tensors; train and eval.

A torch without CUDA builds no autograd graph of CUDA tensors, fake ones included. So compiled code
runs without gradients, and the Function's passes are called by themselves.
"""

from types import SimpleNamespace

import pytest
import torch
from support import images_for, noise_for, pretend_hopper, set_fact, small_mae
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from maefast import kernels
from maefast.blocks import Block
from maefast.ops import BlockWeights
from maefast.ops.linear import Products
from maefast.ops.transformer_block import _Plan, _TransformerBlock

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

BF16, F32 = torch.bfloat16, torch.float32
D, HIDDEN, T = 32, 64, 197  # a head of 32 in 197 tokens: native attention is faster by the committed table
FORWARD = ["layer_norm_fwd", "attention_fwd", "add_layer_norm_fwd", "bias_gelu_fwd"]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_hopper(monkeypatch)
    set_fact(monkeypatch, kernels, "HAS_TRITON", True)


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def block_on_gpu() -> Block:
    block = Block(D, 1, HIDDEN / D, nn.LayerNorm)
    for module in block.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = nn.Parameter(empty(*parameter.shape), requires_grad=False)
    return block


def maefast_ops(graph: torch.fx.Graph) -> list[str]:
    targets = [str(node.target).removesuffix(".default") for node in graph.nodes if node.op == "call_function"]
    return [target.split(".")[1] for target in targets if target.startswith("maefast")]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_blocks_compile_once_for_any_batch_and_length(hopper: None, training: bool) -> None:
    """One whole graph within the lengths that the committed table has as one."""
    recorder = EagerAndRecordGraphs()
    counter = CompileCounterWithBackend(recorder)
    with FakeTensorMode(), torch.no_grad():
        compiled = torch.compile(block_on_gpu().train(training), fullgraph=True, backend=counter)
        for N, tokens in ((2, T), (3, T - 20), (5, T + 10)):
            x = empty(N, tokens, D)
            for dim in (0, 1):
                torch._dynamo.mark_dynamic(x, dim)
            y = compiled(x)
            assert (y.shape, y.dtype, y.device.type) == (x.shape, BF16, "cuda")
    assert counter.frame_count == 1
    assert maefast_ops(recorder.graphs[0].graph) == FORWARD


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_steps_with_a_batch_that_is_not_marked(hopper: None, training: bool) -> None:
    """A first other batch compiles once more, then none."""
    counter = CompileCounterWithBackend("eager")
    with FakeTensorMode(), torch.no_grad():
        compiled = torch.compile(block_on_gpu().train(training), fullgraph=True, backend=counter)
        for i, N in enumerate((2, 2, 3, 5, 4)):
            with torch._dynamo.config.patch(error_on_recompile=i > 2):
                compiled(empty(N, T, D))
    assert counter.frame_count == 2


class Context(SimpleNamespace):
    """What a Function's passes see of autograd."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


@pytest.mark.parametrize("pending", [True, False], ids=["pending", "alone"])
@pytest.mark.parametrize("stream", [F32, BF16], ids=["autocast", "bf16"])
def test_forward_and_backward_of_the_block(hopper: None, pending: bool, stream: torch.dtype) -> None:
    """No norm or GELU is recomputed; gradients have the dtypes of their tensors."""
    plan = _Plan("triton", 1, 1e-6, BF16, Products(False, False, None, False), keep=True)
    shapes = [(D,), (D,), (3 * D, D), (3 * D,), (D, D), (D,), (D,), (D,), (HIDDEN, D), (HIDDEN,), (D, HIDDEN), (D,)]

    def run(x: Tensor, dx: Tensor, dy: Tensor, *weights: Tensor) -> list[Tensor | None]:
        ctx = Context(needs_input_grad=(False, True, pending, False, False, *(len(weights) * [True])))
        outs = _TransformerBlock.forward(ctx, plan, x, empty(2, T, D) if pending else None, None, None, *weights)
        return [*outs, *_TransformerBlock.backward(ctx, dx, dy)]

    with FakeTensorMode(), torch.no_grad():
        weights = [empty(*shape, dtype=stream) for shape in shapes]
        x, dx, dy = empty(2, T, D, dtype=stream), empty(2, T, D, dtype=stream), empty(2, T, D)
        graph = make_fx(run)(x, dx, dy, *weights)
        x2, branch, _, gx, gpending, _, _, *gradients = run(x, dx, dy, *weights)
    assert [(t.shape, t.dtype) for t in (x2, branch)] == [(x.shape, stream), (x.shape, BF16)]
    assert (gx.shape, gx.dtype) == (x.shape, stream)
    assert (gpending is None) == (not pending)
    for name, gradient, weight in zip(BlockWeights._fields, gradients, weights, strict=True):
        assert (gradient.shape, gradient.dtype) == (weight.shape, weight.dtype), name
    first = "add_layer_norm_fwd" if pending else "layer_norm_fwd"
    backward = ["bias_gelu_bwd", "layer_norm_bwd", "attention_bwd", "layer_norm_bwd"]
    assert maefast_ops(graph.graph) == [first, *FORWARD[1:], *backward]
    wide = [node for node in graph.graph.nodes if str(node.target) == "aten.mm.dtype"]
    assert len(wide) == (4 if stream == F32 else 0)  # qkv, proj, fc1, fc2


def test_a_compiled_model_in_evaluation() -> None:
    """Train and eval are a graph each; neither compiles again for another step or image."""
    model = small_mae(depth=1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)
    for mode in (True, False):
        model.train(mode)
        with torch.set_grad_enabled(mode):
            for seed in range(3):
                imgs, noise = images_for(model, seed=seed), noise_for(model, seed=seed)
                with torch._dynamo.config.patch(error_on_recompile=seed > 0):
                    got, expected = compiled(imgs, noise=noise), model(imgs, noise=noise)
                assert torch.equal(got.loss, expected.loss)
                assert torch.equal(got.pred, expected.pred)
    assert counter.frame_count == 2
