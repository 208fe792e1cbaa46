"""Blocks: the fused path against the modules and against float64, and everything that takes a block off it."""

import copy
import io
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from support import BATCHES, NATIVE, Calls, Results, assert_results, attends_otherwise, small_mae
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import maefast
from maefast import reference
from maefast.blocks import Block, Route
from maefast.ops import _tokens
from maefast.ops._tokens import RepeatedTokens, take_tokens

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
MODES = {  # of the parameters and x, and what autocast is on
    "fp32": (F32, None),
    "bf16 autocast": (F32, BF16),
    "fp16 autocast": (F32, F16),
    "bf16": (BF16, None),
}
D, HEADS, T = 24, 3, 19
SUBMODULES = ("norm1", "attn", "attn.qkv", "attn.proj", "norm2", "mlp", "mlp.fc1", "mlp.fc2")


def make_block(dtype: torch.dtype = F32, seed: int = 0, norm_layer: Callable[[int], nn.Module] = nn.LayerNorm) -> Block:
    """Every parameter random: none is left at the zeros and ones of a fresh block."""
    torch.manual_seed(seed)
    block = Block(D, HEADS, 4.0, norm_layer)
    with torch.no_grad():
        for name, p in block.named_parameters():
            p.copy_(torch.randn(p.shape) * 0.3 + (1.0 if "norm" in name and "weight" in name else 0.0))
    return block.to(dtype)


def plain(block: Block) -> reference.Block:
    """The same weights in the reference's block."""
    out = reference.Block(D, HEADS, 4.0, nn.LayerNorm, "sdpa").to(block.attn.qkv.weight.dtype)
    out.load_state_dict(block.state_dict())
    return out


def through_modules(block: Block) -> Block:
    """The same block with a hook that does nothing, so that each of its modules is called."""
    block = copy.deepcopy(block)
    block.mlp.fc1.register_forward_hook(lambda module, args, out: None)
    return block


def autocast(dtype: torch.dtype | None) -> AbstractContextManager[object]:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def run(block: nn.Module, x: Tensor, dy: Tensor, dtype: torch.dtype | None = None, ids: Tensor | None = None) -> Results:
    """The output and the gradients of x and of every parameter that has one."""
    x = x.detach().requires_grad_()
    block.zero_grad()
    with autocast(dtype):
        y = block(x) if ids is None else block(x, ids)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in block.named_parameters() if p.grad is not None}


def samples(count: int, dtype: torch.dtype, rows: int = T) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(3, T, D).to(dtype), torch.randn(3, rows, D)) for _ in range(count)]


def both(block: Block) -> list[nn.Module]:
    return [plain(block), attends_otherwise(plain(block))]


def through_ops(block: Block) -> Block:
    """The same block with an attention that is not maefast's."""
    block = copy.deepcopy(block)
    block.attn.backend = "sdpa"
    return block


WAYS = {Route.FUSED: lambda block: block, Route.OPS: through_ops, Route.MODULES: through_modules}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("route", Route, ids=lambda route: route.name)
def test_every_route_against_float64(native, route, mode):
    dtype, cast = mode
    block = make_block(dtype)
    exact, mine = plain(block).double(), WAYS[route](block)
    with autocast(cast):
        assert mine.route(torch.device("cpu"), dtype, T)[0] is route
    cases = samples(BATCHES, dtype)
    assert_results(
        [run(mine, x, dy, cast) for x, dy in cases],
        [[run(eager, x, dy, cast) for x, dy in cases] for eager in both(block)],
        [run(exact, x.double(), dy.double()) for x, dy in cases],
    )


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_each_instruction_set(isa, mode):
    dtype, cast = mode
    block = make_block(dtype)
    cases = samples(BATCHES, dtype)
    assert_results(
        [run(block, x, dy, cast) for x, dy in cases],
        [[run(eager, x, dy, cast) for x, dy in cases] for eager in both(block)],
        [run(plain(block).double(), x.double(), dy.double()) for x, dy in cases],
    )


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_inference(mode):
    """Without gradients GELU follows its product at once; the same numbers by the rule, and nothing is kept."""
    dtype, cast = mode
    block = make_block(dtype)
    eager, exact = plain(block), plain(block).double()
    for context in (torch.no_grad, torch.inference_mode):
        results: list[list[Results]] = [[], [], []]
        for x, _ in samples(8, dtype):
            with context(), autocast(cast):
                y = block(x)
                assert not y.requires_grad
                results[0].append({"y": y})
                results[1].append({"y": eager(x)})
            with context():
                results[2].append({"y": exact(x.double())})
        assert_results(results[0], [results[1]], results[2])


def test_the_fused_path_is_taken(native):
    """One Function for a block in training, and what it recomputes in backward."""
    block = make_block()
    with Calls() as calls, maefast.backend("native"):
        y = block(torch.randn(2, T, D))
        forward = list(calls.names)
        assert fused_into(y)
        y.sum().backward()
    product = "linear_fwd"
    assert forward == [
        "layer_norm_fwd", product, "attention_fwd", product, "add_layer_norm_fwd", product, "bias_gelu_fwd", product,
    ]  # fmt: skip
    backward = calls.names[len(forward) :]
    assert backward.count(product) == 8
    assert [name for name in backward if name != product] == [
        "bias_gelu_bwd", "layer_norm_bwd", "attention_bwd", "layer_norm_bwd",
    ]  # fmt: skip


def fused_into(y: Tensor) -> bool:
    """Whether y is the sum of the residual stream and the branch that the fused block gives."""
    return {type(function).__name__ for function, _ in y.grad_fn.next_functions} == {"_TransformerBlockBackward"}


def is_fused(block: Block) -> bool:
    return fused_into(block(torch.randn(2, T, D)))


@pytest.mark.parametrize("name", SUBMODULES)
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_are_called(name, kind):
    block, seen = make_block(), []
    module = block.get_submodule(name)
    handle = getattr(module, f"register_{kind}_hook")(lambda *args: seen.append(args[0]))
    x = torch.randn(2, T, D, requires_grad=True)
    block(x).sum().backward()
    assert seen == [module]
    handle.remove()
    assert is_fused(block) == NATIVE
    assert seen == [module]


def test_a_hook_that_changes_the_output_is_honoured():
    block = make_block()
    block.attn.register_forward_hook(lambda module, args, out: out * 0)
    block.mlp.register_forward_hook(lambda module, args, out: out * 0)
    x = torch.randn(2, T, D)
    assert torch.equal(block(x), x)


def test_hooks_on_all_modules_are_called():
    block, seen = make_block(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        block(torch.randn(2, T, D))
    finally:
        handle.remove()
    assert {id(module) for module in seen} == {id(module) for module in block.modules()}


class LoRA(nn.Linear):
    """A Linear with a low-rank addition of its own."""

    def __init__(self, base: nn.Linear):
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.a, self.b = nn.Parameter(torch.randn(2, base.in_features)), nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.a.T @ self.b.T


@pytest.mark.parametrize("name", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_a_linear_that_was_swapped_is_honoured(name):
    """As if its addition were part of the weight."""
    block = make_block()
    lora = LoRA(block.get_submodule(name))
    merged = plain(block).double()
    with torch.no_grad():
        merged.get_submodule(name).weight += lora.b.double() @ lora.a.double()
    block.set_submodule(name, lora)
    x = torch.randn(2, T, D)
    y = block(x)
    torch.testing.assert_close(y, merged(x.double()).float(), rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert lora.a.grad.abs().sum() > 0
    assert not is_fused(block)


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * x.square().mean(dim=-1, keepdim=True).add(1e-6).rsqrt() * self.scale


class CenteredNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - 1


NORMS = {
    "rms": RMSNorm,
    "subclass": CenteredNorm,
    "no_affine": lambda dim: nn.LayerNorm(dim, elementwise_affine=False),
    "no_bias": lambda dim: nn.LayerNorm(dim, bias=False),
    "identity": lambda dim: nn.Identity(),
}


@pytest.mark.parametrize("ids", [None, torch.tensor([[3, 0], [7, 8]])], ids=["whole", "ids"])
@pytest.mark.parametrize("norm_layer", NORMS.values(), ids=NORMS)
def test_other_norms(norm_layer, ids):
    block = make_block(norm_layer=norm_layer)
    x = torch.randn(2, T, D)
    h = x + attention_by_hand(block, block.norm1(x))
    expected = h + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(h))))
    if ids is not None:
        expected = torch.stack([expected[n, ids[n]] for n in range(2)])
    torch.testing.assert_close(block(x, ids), expected, rtol=1e-5, atol=1e-5)


def attention_by_hand(block: Block, x: Tensor) -> Tensor:
    q, k, v = block.attn.qkv(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) / (D // HEADS) ** 0.5).softmax(dim=-1)
    return block.attn.proj((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("name", ["attn.qkv", "mlp.fc2"])
def test_linears_without_bias(name):
    block = make_block()
    block.get_submodule(name).bias = None
    other = make_block()
    other.get_submodule(name).bias.data.zero_()
    x = torch.randn(2, T, D)
    torch.testing.assert_close(block(x), other(x), rtol=1e-5, atol=1e-5)


def test_a_forward_of_the_instance_is_called():
    block = make_block()
    block.attn.forward = torch.zeros_like
    block.mlp.forward = torch.zeros_like
    x = torch.randn(2, T, D)
    assert torch.equal(block(x), x)


def test_x_of_another_dtype_than_the_weights_is_refused(native):
    """By torch, as in the module path: nothing is cast in silence."""
    for block in (make_block(BF16), through_modules(make_block(BF16))):
        with pytest.raises(RuntimeError, match="dtype"):
            block(torch.randn(2, T, D))


def test_norms_in_fp32_beside_bf16(native):
    block = make_block(BF16)
    block.norm1.float()
    block.norm2.float()
    eager, exact = copy.deepcopy(through_modules(block)), plain(make_block()).double()
    exact.load_state_dict(block.state_dict())
    cases = samples(BATCHES, BF16)
    assert_results(
        [run(block, x, dy) for x, dy in cases],
        [[run(eager, x, dy) for x, dy in cases]],
        [run(exact, x.double(), dy.double()) for x, dy in cases],
    )


@pytest.mark.parametrize("frozen", ["attn", "mlp.fc1", "norm", "bias", "weight", "norm2.weight"])
def test_frozen_parameters(frozen):
    """Have no gradient; the others have the bits that they have beside them."""
    block = make_block()
    ((x, dy),) = samples(1, F32)
    expected = run(block, x, dy)
    for name, p in block.named_parameters():
        p.requires_grad_(frozen not in name)
    got = run(block, x, dy)
    assert {name for name in expected if frozen in name} == expected.keys() - got.keys()
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name


def test_a_frozen_block_passes_the_gradient_on():
    block = make_block()
    ((x, dy),) = samples(1, F32)
    expected = run(block, x, dy)["x"]
    block.requires_grad_(False)
    got = run(block, x, dy)
    assert got.keys() == {"y", "x"}
    assert torch.equal(got["x"], expected)


def test_gradients_without_one_for_x():
    """The first block of an encoder whose embedding is frozen."""
    block = make_block()
    ((x, dy),) = samples(1, F32)
    expected = run(block, x, dy)
    block.zero_grad()
    block(x).backward(dy)
    assert x.grad is None
    for name, p in block.named_parameters():
        assert torch.equal(p.grad, expected[name]), name


def random_ids(rows: int) -> Tensor:
    return torch.rand(3, T).argsort(dim=1)[:, :rows]


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("rows", [1, 13, T])
def test_tokens_of_ids(mode, rows):
    """Rows of the whole block, with the gradients that these alone would have."""
    dtype, cast = mode
    block = make_block(dtype)
    cases = [(x, dy, random_ids(rows)) for x, dy in samples(BATCHES, dtype, rows)]

    class Rows(nn.Module):
        """The plain block, then its rows."""

        def __init__(self, block: nn.Module):
            super().__init__()
            self.block = block

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            return self.block(x).gather(1, ids[..., None].expand(-1, -1, D))

    def by_rows(block: nn.Module, x: Tensor, dy: Tensor, ids: Tensor, dtype: torch.dtype | None = None) -> Results:
        return {name.removeprefix("block."): value for name, value in run(Rows(block), x, dy, dtype, ids).items()}

    assert_results(
        [run(block, x, dy, cast, ids) for x, dy, ids in cases],
        [[by_rows(eager, x, dy, ids, cast) for x, dy, ids in cases] for eager in both(block)],
        [by_rows(plain(block).double(), x.double(), dy.double(), ids) for x, dy, ids in cases],
    )


def test_tokens_of_ids_with_a_hook_are_rows_of_the_whole_block():
    block, ids = make_block(), random_ids(7)
    watched = through_modules(block)
    ((x, dy),) = samples(1, F32, 7)
    seen = []
    watched.norm2.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    got = run(watched, x, dy, ids=ids)
    assert seen == [(3, T, D)]
    with torch.no_grad():
        assert torch.equal(got["y"], take_tokens(watched(x), ids))
    for name, value in run(block, x, dy, ids=ids).items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4)


def test_take_tokens():
    x, ids = torch.arange(24.0).view(2, 4, 3).requires_grad_(), torch.tensor([[3, 0, 3], [1, 1, 2]])
    out = take_tokens(x, ids)
    assert torch.equal(out, torch.stack([x[n, ids[n]] for n in range(2)]))
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert dx[:, :, 0].tolist() == [[1, 0, 0, 2], [0, 2, 1, 0]]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant):
    block = make_block()
    ((x, dy),) = samples(1, F32)
    expected = run(block, x, dy)

    class Checkpointed(nn.Module):
        def __init__(self, block: nn.Module):
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=use_reentrant)

    for name, value in run(Checkpointed(block), x, dy).items():
        assert torch.equal(value, expected[name.removeprefix("block.")]), name


def test_copies_are_the_same_block():
    block = make_block()
    ((x, dy),) = samples(1, F32)
    expected = run(block, x, dy)
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    for other in (copy.deepcopy(block), torch.load(file, weights_only=False)):
        assert is_fused(other) == NATIVE
        for name, value in run(other, x, dy).items():
            assert torch.equal(value, expected[name]), name


def test_functional_call():
    """With parameters from elsewhere, whose gradients go there."""
    block, other = make_block(), make_block(seed=1)
    ((x, dy),) = samples(1, F32)
    expected = run(other, x, dy)
    parameters = {name: p.detach().requires_grad_() for name, p in other.named_parameters()}
    y = torch.func.functional_call(block, parameters, (x,))
    assert torch.equal(y, expected["y"])
    for (name, _), grad in zip(parameters.items(), torch.autograd.grad(y, list(parameters.values()), dy), strict=True):
        assert torch.equal(grad, expected[name]), name
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
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, leaves), strict=True):
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
    """Those of a sum have strides of zero, others are transposed."""
    block = make_block()
    x = torch.randn(3, T, D, requires_grad=True)
    y = block(x)
    (dy,) = torch.autograd.grad(grad_layout(y), y, retain_graph=True)
    got = torch.autograd.grad(grad_layout(y), [x, *block.parameters()])
    expected = run(block, x, dy.contiguous())
    for (name, value), grad in zip(list(expected.items())[1:], got, strict=True):
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
    assert [(name, p.shape) for name, p in block.named_parameters()] == [
        (name, p.shape) for name, p in expected.named_parameters()
    ]
    for name, value in expected.state_dict().items():
        assert torch.equal(block.state_dict()[name], value), name
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


class DecoderStart(nn.Module):
    """The decoder's input, and its first block with each distinct token once; the reference's block takes the input as it is."""

    N, L, K = 5, T - 1, 4

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block
        self.mask_token = nn.Parameter(torch.linspace(-1, 1, D).view(1, 1, D))
        self.pos_embed = nn.Parameter(torch.linspace(-2, 2, T * D).sin().view(1, T, D))

    def forward(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        tokens = (x, ids_restore, self.mask_token, self.pos_embed)
        whole = maefast.ops.unshuffle(*tokens)
        if not isinstance(self.block, Block):
            return self.block(whole)
        x, branch = self.block.advance(whole, None, repeated=RepeatedTokens.of(*tokens))
        return x + branch

    @classmethod
    def samples(cls, count: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
        return [
            (torch.randn(cls.N, 1 + cls.K, D).to(dtype), torch.randn(cls.N, T, D), torch.rand(cls.N, cls.L).argsort(dim=1))
            for _ in range(count)
        ]


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("path", [lambda block: block, through_modules], ids=["fused", "modules"])
def test_repeated_tokens(path, mode):
    """The same output bit for bit, and gradients by the rule, those of the mask token and the positions included."""
    dtype, cast = mode
    block = make_block(dtype)
    mine, eager = DecoderStart(path(block)).to(dtype), DecoderStart(plain(block)).to(dtype)
    exact = DecoderStart(plain(block)).double().requires_grad_()
    exact.load_state_dict(eager.state_dict())
    cases = DecoderStart.samples(BATCHES, dtype)
    got = [run(mine, x, dy, cast, ids) for x, dy, ids in cases]
    assert_results(
        got,
        [[run(start, x, dy, cast, ids) for x, dy, ids in cases] for start in (eager, attends_otherwise(eager))],
        [run(exact, x.double(), dy.double(), ids=ids) for x, dy, ids in cases],
    )
    for result, (x, _, ids) in zip(got, cases, strict=True):
        with autocast(cast):
            whole = maefast.ops.unshuffle(x, ids, mine.mask_token, mine.pos_embed)
            assert torch.equal(result["y"], mine.block(whole))
            with torch.no_grad():
                assert torch.equal(mine(x, ids), mine.block(whole))


def test_repeated_tokens_are_multiplied_once(native):
    start = DecoderStart(make_block())
    ((x, _, ids),) = DecoderStart.samples(1, F32)
    rows = []

    class Rows(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.maefast.linear_fwd.default:
                rows.append(args[0].numel() // args[0].shape[-1])
            return func(*args, **(kwargs or {}))

    with Rows(), maefast.backend("native"):
        start(x, ids)
    tokens = DecoderStart.N * T
    assert rows == [DecoderStart.N * (1 + DecoderStart.K) + DecoderStart.L, tokens, tokens, tokens]


@pytest.mark.parametrize(("N", "L", "K"), [(1, 1, 0), (1, 6, 2), (3, 6, 0), (3, 6, 6), (4, 9, 3)])
def test_rows_of_repeated_tokens(N, L, K):
    """Expanded they are the decoder's input, and `summed` is the transpose of `expanded`."""
    x, ids_restore = torch.randn(N, 1 + K, 5), torch.rand(N, L).argsort(dim=1)
    tokens = (x, ids_restore, torch.randn(1, 1, 5), torch.randn(1, 1 + L, 5))
    repeated = RepeatedTokens.of(*tokens)
    assert repeated.len_keep() == K
    assert torch.equal(repeated.expanded(repeated.rows), maefast.ops.unshuffle(*tokens))
    y = torch.randn(N * (1 + K) + L, 3, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(N, 1 + L, 3, dtype=torch.float64)
    torch.testing.assert_close(repeated.summed(dy), torch.autograd.grad(repeated.expanded(y), y, dy)[0])


class SkippedBlock(Block):
    """A subclass with the signature that blocks have elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


@pytest.mark.parametrize("position", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("change", ["subclass", "wrapper", "instance", "hook"])
def test_decoder_blocks_may_be_others(change, position, monkeypatch):
    """Without pred maefast's own first block computes distinct tokens once, and its last the removed ones alone; any other is
    called as block(x)."""
    monkeypatch.setattr(_tokens, "REPEATED_VALUES", 0)
    model = small_mae(decoder_depth=2)
    block = model.decoder_blocks[position]
    seen = []
    if change == "subclass":
        model.decoder_blocks[position] = SkippedBlock(24, 3, 4.0, nn.LayerNorm)
    elif change == "wrapper":
        model.decoder_blocks[position] = nn.Sequential(block)
    elif change == "instance":
        forward = block.forward
        block.forward = lambda x: forward(x)
    else:
        block.register_forward_hook(lambda module, args, out: seen.append((len(args), out.shape)))
    imgs, noise = torch.randn(2, 3, 64, 48), torch.rand(2, 24)
    torch.testing.assert_close(model(imgs, noise=noise, return_pred=False).loss, model(imgs, noise=noise).loss, rtol=1e-5, atol=0)
    assert seen == ([(1, (2, 25, 24))] * 2 if change == "hook" else [])
