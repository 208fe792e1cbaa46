"""The step benchmarks for GPUs, as far as a CPU shows them: contenders, gates, memory, rates."""

import dataclasses

import machine
import measure
import pytest
import stepbench
import test_step
import torch
from support import assert_equal

from maefast.testing import timing

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL_STEP = test_step.TINY


def gpu_step(batch: int) -> stepbench.StepWorkload:
    return stepbench.StepWorkload("any", dataclasses.replace(SMALL_STEP, batch=batch), "bf16", CUDA)


def test_contenders_of_a_step_on_a_gpu():
    large, small = gpu_step(1024).contenders, gpu_step(8).contenders
    assert set(small) - set(large) == {"maefast-graphed"}
    on_cpu = dataclasses.replace(gpu_step(8), device=CPU).contenders
    assert set(large) - set(on_cpu) == {"reference-math-fp16"}
    sizes = {w.label: w.size.batch for w in test_step.workloads(full=True, device=CUDA)}
    assert sizes == {"vit_b16": 1024, "vit_b16_batch8": 8, "vit_l16": 512, "vit_h14": 256}


def run_out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("no")


@pytest.fixture(scope="module")
def step_bench() -> stepbench.StepBench:
    return stepbench.StepWorkload("tiny", SMALL_STEP, "bf16", CPU).bench()


def test_a_step_in_fp16_trains_with_a_scaler(step_bench):
    before = step_bench.weights.cls_token.detach().clone()
    step = step_bench.run("reference-math-fp16")
    with torch.no_grad():
        assert step_bench._loss_in_fp16(0).dtype == torch.float32
    for i in range(2):  # a scale that is too large skips a step and is halved
        step(i)
    assert not torch.equal(step_bench.weights.cls_token, before)
    assert all(p.grad is None for p in step_bench.weights.parameters())


def test_a_step_that_runs_out_of_memory_leaves_no_gradients(step_bench):
    """The contenders share their weights; the backward fails at the last of them."""
    hook = step_bench.weights.cls_token.register_hook(run_out_of_memory)
    attempts = [lambda: step_bench.results("reference-sdpa")]
    attempts += [lambda name=name: step_bench.run(name)(0) for name in ("maefast", "reference-math-fp16")]
    for attempt in attempts:
        with pytest.raises(torch.OutOfMemoryError):
            attempt()
        assert all(p.grad is None for p in step_bench.weights.parameters())
    hook.remove()


def test_the_gate_of_a_graphed_step(without_graphs):
    bench = stepbench.StepWorkload("tiny", SMALL_STEP, "bf16", CPU).bench()
    run = bench.run("maefast-graphed")
    before = [p.detach().clone() for p in bench.weights.parameters()]
    bench.check("maefast-graphed", run)
    assert_equal(list(bench.weights.parameters()), before)
    run(1)
    assert not torch.equal(bench.weights.cls_token, before[0])
    assert all(p.grad is None for p in bench.weights.parameters())
    for _ in range(3):  # away from the weights of the float64 result
        run(0)
    with pytest.raises(AssertionError, match="maefast-graphed, loss"):
        bench.check("maefast-graphed", run)


class HeavyBench:
    sets, bytes, flops, graphed, held_bytes = 1, None, 1, "graphed", 1000

    def why_not(self, contender: str) -> str | None:
        return None

    def run(self, contender: str) -> timing.Run:
        return run_out_of_memory if contender == "heavy when timed" else lambda i: None

    def check(self, contender: str, run: timing.Run) -> None:
        if contender == "heavy":
            run_out_of_memory()

    def forget(self) -> None:
        pass


class HeavyWorkload:
    name, contenders, images, dtype = "any", ("light", "heavy", "heavy when timed", "graphed"), 1, torch.float32
    bench = HeavyBench


def test_a_step_that_does_not_fit_into_the_gpu_leaves_its_group(monkeypatch):
    """The others are timed, with the memory above what was there and what a contender holds."""
    for name, value in {"memory_allocated": 500, "max_memory_allocated": 700, "reset_peak_memory_stats": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(measure, "timer_for", lambda device: timing.WallTimer())
    for probe in ("copy_probe", "gemm_probe"):
        monkeypatch.setattr(machine, probe, lambda *_: lambda i: None)
    group = measure.Group(HeavyWorkload(), "any", measure.Options(full=False, device=CUDA))
    assert group.skipped == dict.fromkeys(("heavy", "heavy when timed"), "out of GPU memory")
    assert set(group.samples) == {"light", "graphed", measure.COPY, measure.GEMM}
    assert group.peak == {"light": 700 - 500 + 1000}


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4e12),
        ("NVIDIA H200", torch.float16, 989.4e12),
        ("NVIDIA H200", torch.float32, None),
        ("NVIDIA L4", torch.bfloat16, None),
    ],
)
def test_nominal_rate(monkeypatch, name, dtype, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert machine.nominal_flops(CUDA, dtype) == expected
    assert machine.nominal_flops(CPU, dtype) is None
