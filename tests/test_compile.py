"""torch.compile: whole graphs, eager's masks, no recompilation in training, switched backends."""

import copy
import math

import pytest
import torch
from support import BATCHES, IMAGES, Batch, assert_results, images_for, noise_for, small_mae, small_reference, step
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs

import maefast
from maefast import MAE, ops
from maefast.blocks import Block
from maefast.ops import _tokens

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

SHALLOW = {"depth": 1}


def assert_same_step(compiled: nn.Module, eager: nn.Module, imgs: Tensor, noise: Tensor, mode: str = "fp32", **options) -> None:
    mine, theirs = (step(model, imgs, noise, mode, **options) for model in (compiled, eager))
    for name, value in theirs.items():
        assert torch.equal(mine[name if name in mine else f"_orig_mod.{name}"], value), name


@pytest.mark.parametrize("mode", ["fp32", "autocast"])
def test_inductor_model_forward_and_backward(mode):
    """Against the reference, eager and compiled (Inductor sums in another order)."""
    reference = small_reference(**SHALLOW)
    compiled_reference = torch.compile(copy.deepcopy(reference), fullgraph=True, dynamic=False)
    model, exact_model = small_mae(**SHALLOW), copy.deepcopy(reference).double()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)

    def run(seed: int) -> Batch:
        imgs = images_for(model, IMAGES, seed=seed)
        torch.manual_seed(seed)
        noise = torch.rand(IMAGES, 24)
        torch.manual_seed(seed)
        results = [step(compiled, imgs, None, mode), *(step(m, imgs, noise, mode) for m in (reference, compiled_reference))]
        got, *eager = ({name.removeprefix("_orig_mod."): value for name, value in run.items()} for run in results)
        return got, eager, step(exact_model, imgs.double(), noise)

    assert_results(map(run, range(BATCHES)))


def test_inductor_draws_the_noise_of_torch_rand():
    @torch.compile(fullgraph=True)
    def draws(x: Tensor) -> tuple[Tensor, Tensor]:
        return ops.masking_noise(4, 30, x.device) + x, ops.masking_noise(4, 30, x.device) + x

    torch.manual_seed(5)
    first, second = draws(torch.zeros(4, 30))
    torch.manual_seed(5)
    assert torch.equal(first, torch.rand(4, 30))
    assert torch.equal(second, torch.rand(4, 30))
    assert not torch.equal(first, second)


def two_and_compiled(monkeypatch: pytest.MonkeyPatch) -> tuple[MAE, MAE, nn.Module, CompileCounterWithBackend]:
    """Two models whose decoders compute repeated tokens once, the first also compiled."""
    monkeypatch.setattr(_tokens, "REPEATED_VALUES", 0)
    model, eager = (small_mae(decoder_depth=2, **SHALLOW) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    return model, eager, torch.compile(model, fullgraph=True, backend=counter), counter


def test_training_does_not_recompile(monkeypatch):
    model, eager, compiled, counter = two_and_compiled(monkeypatch)
    losses = []
    for m, parameters in ((compiled, model.parameters()), (eager, eager.parameters())):
        optimizer = torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.1)
        torch.manual_seed(3)
        for i in range(4):
            optimizer.zero_grad()
            loss = m(images_for(model, seed=i), return_pred=False).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert counter.frame_count == 1
    assert losses[:4] == losses[4:]


@pytest.mark.parametrize("options", [{}, {"return_pred": False}], ids=["pred", "no_pred"])
def test_dynamic_batch_compiles_once(options, monkeypatch):
    model, eager, compiled, counter = two_and_compiled(monkeypatch)
    for N in (4, 2, 7):
        imgs, noise = images_for(model, N=N, seed=N), noise_for(model, N=N)
        for tensor in (imgs, noise):
            torch._dynamo.mark_dynamic(tensor, 0)
        assert_same_step(compiled, eager, imgs, noise, **options)
    assert counter.frame_count == 1


def test_a_mask_ratio_of_each_step():
    """One graph for each number of kept patches, whatever the ratio."""
    model, eager = small_mae(**SHALLOW), small_mae(**SHALLOW)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    imgs, noise = images_for(model), noise_for(model)
    for ratio in (0.75, 0.5, 0.6):  # keep 6, 12 and 9 of 24
        assert_same_step(compiled, eager, imgs, noise, mask_ratio=ratio)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for ratio in (0.75, 0.49, 0.62):
            assert_same_step(compiled, eager, imgs, noise, mask_ratio=ratio)


def test_blocks_compiled_one_by_one_take_any_mask_ratio(monkeypatch):
    monkeypatch.setattr(_tokens, "REPEATED_VALUES", -math.inf)
    model, eager = (small_mae(decoder_depth=2, **SHALLOW) for _ in range(2))
    for block in (*model.blocks, *model.decoder_blocks):
        block.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    for i, ratio in enumerate((0.75, 0.5, 0.6, 0.9, 0.1)):
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            assert_same_step(model, eager, images_for(model), noise_for(model), mask_ratio=ratio, return_pred=False)


def test_a_whole_step_with_the_optimizer_compiles_once():
    """Two graphs about the call of backward, none more after the first step; a tensor as rate."""

    def losses(backend: CompileCounterWithBackend | None) -> list[float]:
        model, lr = small_mae(**SHALLOW), torch.tensor(0.0)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, fused=True)

        def train_step(imgs: Tensor) -> Tensor:
            loss = model(imgs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        run = torch.compile(train_step, backend=backend) if backend else train_step
        torch.manual_seed(3)
        out = []
        for i in range(5):
            lr.fill_(1e-2 * (i + 1))
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                out.append(run(images_for(model, seed=i)).item())
        return out

    counter = CompileCounterWithBackend("aot_eager")
    assert losses(counter) == losses(None)
    assert counter.frame_count == 2


@pytest.mark.parametrize(("dtype", "mode"), [(torch.float32, "autocast"), (torch.uint8, "fp32")], ids=["bf16", "uint8"])
def test_other_inputs(dtype, mode):
    """Autocast on float images, and uint8 images with a mask given as noise."""
    model, eager = small_mae(**SHALLOW), small_mae(**SHALLOW)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    imgs, noise = images_for(model, dtype=dtype), (noise_for(model).argsort(dim=1) >= 6).float()
    assert_same_step(compiled, eager, imgs, noise, mode)
    assert torch.equal(eager(imgs, noise=noise).mask, noise)


def block_run(block: nn.Module, x: Tensor, ids: Tensor | None, cast: bool) -> list[Tensor]:
    """The output, and with gradients on those of x and of the parameters; N and T may vary."""
    x = x.detach().requires_grad_(torch.is_grad_enabled())
    for tensor, dim in ((x, 0), (x, 1), (ids, 0)):
        if tensor is not None:
            torch._dynamo.mark_dynamic(tensor, dim)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        y = block(x) if ids is None else block(x, ids)
    if not torch.is_grad_enabled():
        return [y]
    return [y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])]


@pytest.mark.parametrize(  # every pair of the three
    ("grad", "cast", "with_ids"),
    [(True, False, False), (True, True, True), (False, False, True), (False, True, False)],
    ids=["training-fp32-whole", "training-autocast-ids", "inference-fp32-ids", "inference-autocast-whole"],
)
def test_blocks_of_any_batch_and_length_compile_once(grad, cast, with_ids):
    """Two blocks are one graph for any number of samples and tokens, with the results of eager."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (Block(16, 2, 2.0, nn.LayerNorm) for _ in range(2))

        def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
            return self.second(self.first(x), ids)

    two = Two()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(two, fullgraph=True, backend=counter)
    with torch.set_grad_enabled(grad):
        for N, T in ((3, 7), (5, 12), (2, 30)):
            x, ids = torch.randn(N, T, 16), torch.rand(N, T).argsort(dim=1)[:, :4] if with_ids else None
            got, expected = block_run(compiled, x, ids, cast), block_run(two, x, ids, cast)
            for a, b in zip(got, expected, strict=True):
                assert a.dtype == b.dtype
                assert torch.equal(a, b)
    assert counter.frame_count == 1


def test_compiled_blocks_run_the_fused_path(native):
    recorder = EagerAndRecordGraphs()
    block = Block(16, 2, 2.0, nn.LayerNorm)
    torch.compile(block, fullgraph=True, backend=recorder)(torch.randn(2, 5, 16)).sum().backward()
    assert "autograd_function_apply" in "".join(str(node.target) for graph in recorder.graphs for node in graph.graph.nodes)
    with torch.no_grad():
        torch.compile(block, fullgraph=True, backend=recorder)(torch.randn(2, 5, 16))
    targets = [str(node.target) for node in recorder.graphs[-1].graph.nodes]
    for name in ("layer_norm_fwd", "attention_fwd", "add_layer_norm_fwd"):
        assert sum(f"maefast.{name}" in target for target in targets) == 1, name


def test_encode():
    model = small_mae(**SHALLOW)
    imgs = images_for(model)
    counter = CompileCounterWithBackend("aot_eager")
    encode = torch.compile(model.encode, fullgraph=True, backend=counter)
    for _ in range(2):
        assert torch.equal(encode(imgs), model.encode(imgs))
    assert counter.frame_count == 1


def pre_norm_step(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Run each op; one sum's normalised form is not used, and one's normalised form alone."""
    y, total = ops.add_layer_norm(branch, x, weight, bias, dtype=torch.bfloat16)
    only_y, _ = ops.add_layer_norm(ops.bias_gelu(y, bias), total, weight, bias)
    _, only_total = ops.add_layer_norm(ops.bias_gelu(only_y), total, weight, bias)
    return ops.layer_norm(only_total, weight, bias, dtype=torch.float16), total


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_layer_norms_and_gelu(native, backend):
    """Forward and backward as in eager, bit for bit, and no recompilation for another batch."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(pre_norm_step, fullgraph=True, backend=counter)
    for N in (4, 2, 7):
        inputs = [torch.randn(N, 5, 12), torch.randn(N, 5, 12).bfloat16(), torch.randn(12), torch.randn(12)]
        torch._dynamo.mark_dynamic(inputs[0], 0)
        torch._dynamo.mark_dynamic(inputs[1], 0)
        for tensor in inputs:
            tensor.requires_grad_()
        runs = []
        for function in (compiled, pre_norm_step):
            y, total = function(*inputs)
            runs.append([y, total, *torch.autograd.grad(y.float().square().sum() + total.sum(), inputs)])
        for mine, theirs in zip(*runs, strict=True):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)
    assert counter.frame_count == 1


def test_a_switched_backend_is_noticed(native):
    recorder = EagerAndRecordGraphs()
    compiled = torch.compile(ops.random_masking, fullgraph=True, backend=recorder)
    noise = torch.rand(3, 40)
    expected = ops.random_masking_ref(noise, 10)

    def run() -> None:
        assert all(torch.equal(a, b) for a, b in zip(compiled(noise, 10), expected, strict=True))

    run()
    with maefast.backend("eager"):
        run()
        run()
    run()
    calls = [any("random_masking_fwd" in str(node.target) for node in graph.graph.nodes) for graph in recorder.graphs]
    assert calls == [True, False]


def test_a_request_that_cannot_run_raises_from_compiled_code(native):
    compiled = torch.compile(ops.gather_patches, backend="eager")
    imgs, ids = torch.rand(1, 1, 4, 4), torch.tensor([[1]])
    assert torch.equal(compiled(imgs, ids, 2), ops.gather_patches(imgs, ids, 2))
    with maefast.backend("native"), pytest.raises(Exception, match=r"gather_patches cannot run.*float64"):
        compiled(imgs.double(), ids, 2)


def test_bad_values_raise_from_compiled_code(each_backend):
    """Nothing reads out of bounds: the native kernels check, and plain torch has its own errors."""
    compiled = torch.compile(ops.gather_patches, fullgraph=True, backend="aot_eager")
    imgs, ids = torch.rand(1, 1, 4, 4), torch.tensor([[1]])
    assert torch.equal(compiled(imgs, ids, 2), ops.gather_patches(imgs, ids, 2))
    error = ValueError if each_backend == "native" else (IndexError, RuntimeError)
    with pytest.raises(error, match="ids must be in" if each_backend == "native" else "out of bounds|out of range"):
        compiled(imgs, ids + 7, 2)
