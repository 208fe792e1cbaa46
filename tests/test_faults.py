"""Faults within a step, in processes, on devices: right, or a clear error, nothing half changed."""

import re
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from support import NATIVE, assert_equal, images_for, noise_for, set_fact, small_mae
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from maefast import _library, dispatch, gpu, kernels
from maefast.blocks import Route
from maefast.ops.transformer_block import _TransformerBlock
from maefast.train.optim import adamw
from maefast.train.step import training_step

ROOT = Path(__file__).resolve().parent.parent
CUDA, CPU, F32 = torch.device("cuda", 0), torch.device("cpu"), torch.float32


def no_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def fail_in_backward(monkeypatch: pytest.MonkeyPatch, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """In the first block of the encoder, when the decoder has its gradients."""
    model.patch_embed.proj.weight.register_hook(no_memory)


def fail_in_the_optimizer(monkeypatch: pytest.MonkeyPatch, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """While the moments of the third parameter are created."""
    made, zeros_like = [], torch.zeros_like

    def scarce(*args: object, **kwargs: object) -> Tensor:
        made.append(1)
        return no_memory() if len(made) == 6 else zeros_like(*args, **kwargs)

    monkeypatch.setattr(torch, "zeros_like", scarce)


@pytest.mark.parametrize(  # an optimizer that has its state allocates nothing
    ("fail", "steps_before"), [(fail_in_backward, 0), (fail_in_backward, 2), (fail_in_the_optimizer, 0)]
)
def test_a_step_without_memory_leaves_what_was_before_it(monkeypatch, fail, steps_before):
    runs = []
    for fails in (True, False):
        model = small_mae()
        optimizer = adamw(model, 0.01, backend="torch")
        step = partial(training_step, model, optimizer, images_for(model), noise=noise_for(model), return_pred=False)
        for _ in range(steps_before):
            step()
        if fails:
            weights = [p.detach().clone() for p in model.parameters()]
            with monkeypatch.context() as patch:
                fail(patch, model, optimizer)
                with pytest.raises(torch.OutOfMemoryError):
                    step()
            if fail is fail_in_backward:
                model.patch_embed.proj.weight._backward_hooks.clear()
            assert_equal(list(model.parameters()), weights)
            assert all(p.grad is None for p in model.parameters())
            assert len(optimizer.state) == (len([p for p in model.parameters() if p.requires_grad]) if steps_before else 0)
        step()
        runs.append(list(model.parameters()))
    assert_equal(*runs)


@pytest.mark.skipif(not NATIVE, reason="a block is one Function where its kernels are native")
def test_a_block_without_memory_gives_no_gradient(monkeypatch):
    """Its backward pass returns all gradients of a block or none."""
    model = small_mae()
    loss = model(images_for(model), noise=noise_for(model)).loss
    backward = _TransformerBlock.backward

    def fails_at_its_end(ctx, *grads: Tensor) -> None:
        backward(ctx, *grads)
        no_memory()

    monkeypatch.setattr(_TransformerBlock, "backward", staticmethod(fails_at_its_end))
    with pytest.raises(torch.OutOfMemoryError):
        loss.backward()
    assert all(p.grad is None for block in (*model.blocks, *model.decoder_blocks) for p in block.parameters())


def test_a_fork_after_cuda(monkeypatch):
    """Decisions that the parent remembers do not hold in the child, which has no GPU."""
    set_fact(monkeypatch, kernels, "HAS_TRITON", True)
    op = dispatch.OPS["layer_norm"]
    asks = op.example(CUDA, F32), op.example(CPU, F32)
    before = [dispatch.choose(op, ask) for ask in asks]

    def child(connection) -> None:
        try:
            connection.send(dispatch.choose(op, asks[1]))
            connection.send(dispatch.choose(op, asks[0]))
        except RuntimeError as error:
            connection.send(f"RuntimeError: {error}")

    def answers() -> list[str]:
        receiving, sending = get_context("fork").Pipe(duplex=False)
        process = get_context("fork").Process(target=child, args=(sending,))
        process.start()
        found = [receiving.recv(), receiving.recv()]
        process.join()
        return found

    assert answers() == [before[1], before[0]]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    on_cpu, on_gpu = answers()
    assert on_cpu == before[1]
    assert re.match("RuntimeError: a process that is forked after CUDA was initialised cannot use cuda:0: .*spawn", on_gpu)
    assert [dispatch.choose(op, ask) for ask in asks] == before, "the parent goes on"


@pytest.mark.skipif(not NATIVE, reason="the route on the CPU is native")
def test_a_model_moved_between_devices(monkeypatch):
    """Its blocks take the kernels of its device; back on the CPU it computes what it did."""
    for owner, name in ((_library, "HAS_CUDA"), (kernels, "HAS_TRITON")):
        set_fact(monkeypatch, owner, name, True)
    set_fact(monkeypatch, gpu, "capability", lambda device: (9, 0))
    model = small_mae(embed_dim=64, num_heads=2, decoder_embed_dim=32, decoder_num_heads=1).bfloat16()
    block = model.blocks[0]
    x = torch.randn(2, 50, 64).bfloat16()
    with torch.no_grad():
        expected, there = block(x), {name: p.detach() for name, p in block.named_parameters()}
        routes = []
        for device in (CPU, CUDA, CPU):
            routes.append(block.route(device, torch.bfloat16, tokens=50))
            if device == CUDA:
                with FakeTensorMode():
                    fakes = {name: torch.empty(p.shape, dtype=p.dtype, device="cuda") for name, p in there.items()}
                    y = torch.func.functional_call(block, fakes, (torch.empty(2, 50, 64, dtype=torch.bfloat16, device="cuda"),))
                    assert (y.shape, y.device.type) == (x.shape, "cuda")
        assert torch.equal(block(x), expected)
    assert routes[0] == routes[2]
    assert routes[0][0] is Route.FUSED
    assert routes[1] != routes[0]


def test_every_launch_takes_the_current_stream():
    """Two models on two streams: each launch of csrc/cuda is on torch's current one."""
    entry = (ROOT / "csrc" / "cuda" / "entry.h").read_text()
    assert "aoti_torch_get_current_cuda_stream(t.get_device_index(), &current)" in entry
    calls = []
    for path in sorted((ROOT / "csrc" / "cuda").rglob("*.cu*")):
        text = path.read_text()
        assert "<<<" not in text, f"{path.name} launches without launch()"
        assert not re.search(r"cuda(DeviceSynchronize|StreamSynchronize|StreamCreate|Memcpy\()", text), path.name
        calls += re.findall(r"[^_\w]launch\((\w+_kernel[^;]*);", text)
    assert len(calls) >= 5
    assert all(re.search(r"\bstream\b", call) for call in calls), calls
