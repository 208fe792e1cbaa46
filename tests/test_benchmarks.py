"""The benchmark harness: rotation, replay, byte counts by hand, gate, memory, report."""

import dataclasses
import gc
import json
import os
import platform
import subprocess
import sys
from unittest.mock import Mock

import machine
import measure
import memory
import pytest
import report
import rotation
import test_ops as bench_ops
import torch
import traffic

from maefast.testing import timing

CPU = torch.device("cpu")
PYTHONPATH = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def test_rotation_runs_each_contender_once_a_round_on_the_round_s_inputs():
    calls: list[tuple[str, int]] = []
    runs = {name: lambda i, name=name: calls.append((name, i)) for name in "abcd"}

    def timer(run, i):
        run(i)
        return float(len(calls))

    samples = timing.rotate(runs, timer, timing.Budget(seconds=0.0, least=6, most=9), sets=3, warmup=2)
    rounds = [calls[i : i + 4] for i in range(0, len(calls), 4)]
    assert len(rounds) == 2 + 6
    for r, timed in enumerate(rounds):
        assert sorted(name for name, _ in timed) == list("abcd")
        assert {i for _, i in timed} == {(r if r < 2 else r - 2) % 3}
    assert len({tuple(name for name, _ in timed) for timed in rounds}) > 1
    positions = {name: [float(4 * r + [n for n, _ in rounds[r]].index(name) + 1) for r in range(2, 8)] for name in "abcd"}
    assert samples == positions  # each sample went to the contender that took it
    assert gc.isenabled()


def test_rotation_s_order_is_the_same_in_every_run_and_its_length_follows_the_budget():
    assert timing.order(["a", "b", "c"], 3) == timing.order(["a", "b", "c"], 3)
    budget = timing.Budget(seconds=10, least=5, most=30)
    assert [budget.rounds(s) for s in (0.0, 0.1, 0.5, 1.0, 100.0)] == [30, 30, 20, 10, 5]


REPLAYED = """
import pytest
from rotation import ReplayClock

CLOCK = ReplayClock()

@pytest.mark.benchmark(timer=CLOCK)
def test_replayed(benchmark):
    CLOCK.replay(benchmark, [0.3, 0.1, 12.7, 1e-7])
"""


def test_replayed_samples_are_what_pytest_benchmark_reports(tmp_path):
    (tmp_path / "test_replayed.py").write_text(REPLAYED)
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark-only", "--benchmark-json=out.json", "test_replayed.py"]
    # pytest-benchmark measures nothing in a worker of pytest-xdist.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=tmp_path, env=inherited | PYTHONPATH, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (bench,) = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert bench["stats"]["data"] == [0.3, 0.1, 12.7, 1e-7]
    assert bench["stats"]["median"] == pytest.approx(0.2, rel=1e-15)
    assert bench["stats"]["rounds"] == 4


def test_bytes_and_flops_by_paper_and_pencil():
    # noise 32, ids_keep 16, ids_restore 64, mask 32; two kept patches of 12 values, 8 bytes each
    assert traffic.masking_bytes(N=2, L=4, K=1, P=12, image_size=4, out_size=4) == (144 + 2 * 12 * 8, 0)
    assert traffic.masking_bytes(N=64, L=196, K=49, P=768, image_size=4, out_size=4) == (19_493_376, 0)
    # x 48, ids 64, token 12, positions 60, y 120; then dy 120, ids 64, dx 48, dtoken 12
    assert traffic.unshuffle_bytes(N=2, L=4, K=1, D=3, x_size=4, token_size=4, out_size=4) == (304, 244)
    assert traffic.unshuffle_flops(N=2, L=4, K=1, D=3) == (30, 18)
    # mask 16, three removed patches of 12 values, 5 bytes each, twice; dpred 4 * 12 * 4
    assert traffic.masked_mse_bytes(N=1, L=4, K=1, P=12, pred_size=4, image_size=1) == (196, 196 + 192)
    assert traffic.masked_mse_flops(N=1, L=4, K=1, P=12) == (36 * 9, 36 * 8)
    # x 24, weight and bias 24, y 12, mean and rstd 16
    # dy 12, x 24, weight 12, mean and rstd 16, dx 24, dweight and dbias 24
    assert traffic.layer_norm_bytes(rows=2, D=3, x_size=4, parameter_size=4, out_size=2) == (76, 112)
    # x 12, residual 24, sum 24, y 12; dy 12, sum 24, its gradient 24, dx 12, dresidual 24; small
    small = (24 + 16, 12 + 16 + 24)
    narrow = traffic.add_layer_norm_bytes(rows=2, D=3, x_size=2, residual_size=4, parameter_size=4, out_size=2)
    assert narrow == (72 + small[0], 96 + small[1])
    # all of 24: x, residual, sum, y; dy, sum, its gradient, and one gradient for both
    wide = traffic.add_layer_norm_bytes(rows=2, D=3, x_size=4, residual_size=4, parameter_size=4, out_size=4)
    assert wide == (96 + small[0], 96 + small[1])
    # x 12, bias 12, y 12; then dy 12, x 12, bias 12, dx 12, dbias 12
    assert traffic.bias_gelu_bytes(rows=2, D=3, x_size=2, bias_size=4) == (36, 60)
    assert traffic.bias_gelu_bytes(rows=2, D=3, x_size=2, bias_size=0) == (24, 36)
    # q, k, v and the output, 16 values of 2 bytes each; then these, dout, dq, dk and dv
    assert traffic.attention_bytes(N=2, T=2, D=4, size=2) == (4 * 32, 8 * 32)
    assert traffic.attention_flops(N=2, T=2, D=4) == (128, 320)
    # qkv 192, proj 64, fc1 256, fc2 256, scores 32, values 32
    assert traffic.block_flops(T=2, D=4) == 832


@pytest.mark.parametrize(
    ("gflop", "model"),
    [
        (58.7, {"L": 196, "K": 49, "P": 768, "D": 768, "depth": 12}),
        (124.5, {"L": 196, "K": 49, "P": 768, "D": 1024, "depth": 24}),
        (291.4, {"L": 256, "K": 64, "P": 588, "D": 1280, "depth": 32}),
    ],
)
def test_model_flops_of_one_training_image(gflop, model):
    assert traffic.mae_step_flops(N=1, decoder_D=512, decoder_depth=8, **model) / 1e9 == pytest.approx(gflop, rel=1e-3)


def test_entries_count_the_bytes_of_their_own_tensors():
    expected = {
        "masking-bf16": traffic.masking_bytes(8, 196, 49, 768, 2, 2),
        "masking-uint8": traffic.masking_bytes(8, 196, 49, 768, 1, 4),
        "unshuffle-autocast": traffic.unshuffle_bytes(8, 196, 49, 512, 2, 4, 4),
        "masked_mse-autocast": traffic.masked_mse_bytes(8, 196, 49, 768, 2, 4),
        "layer_norm-autocast": traffic.layer_norm_bytes(8 * 197, 512, 4, 4, 2),
        "add_layer_norm-autocast": traffic.add_layer_norm_bytes(8 * 197, 512, 2, 4, 4, 2),
        "gelu-autocast": traffic.bias_gelu_bytes(8 * 197, 2048, 2, 4),
        "gelu-fp32": traffic.bias_gelu_bytes(8 * 197, 2048, 4, 0),
    }
    found = {w.name: w.bench().bytes for w in bench_ops.workloads(full=False, device=CPU) if w.name in expected}
    assert found == {name: sum(passes) for name, passes in expected.items()}


def test_the_forward_pass_alone_on_a_gpu():
    unshuffles = [w for w in bench_ops.workloads(full=True, device=torch.device("cuda")) if w.name.startswith("unshuffle-bf16")]
    assert [w.name for w in unshuffles] == ["unshuffle-bf16", "unshuffle-bf16-forward"]
    assert [(w.N, w.forward) for w in unshuffles] == [(1024, False), (1024, True)]
    bench = dataclasses.replace(unshuffles[1], N=2, device=CPU).bench()
    assert bench.bytes == traffic.unshuffle_bytes(2, 196, 49, 512, 2, 2, 2).forward
    for contender in ("reference", "maefast-eager"):
        bench.check(contender, bench.run(contender))
        assert bench.run(contender)(0).keys() == {"y"}


def test_the_gate_stops_a_wrong_result_and_lets_the_reference_pass():
    entry = next(entry for entry in bench_ops.ENTRIES if entry.name == "unshuffle")

    def wrong(**inputs):
        return {"y": bench_ops.plain_unshuffle(**inputs)["y"] * (1 + 1e-5)}

    bench = bench_ops.OpWorkload(dataclasses.replace(entry, fused=wrong), "fp32", 2, CPU).bench()
    bench.check("reference", bench.run("reference"))
    with pytest.raises(AssertionError, match="unshuffle-fp32, maefast-eager, y: relative L2 error"):
        bench.check("maefast-eager", bench.run("maefast-eager"))
    with pytest.raises(rotation.NotOursError, match="unshuffle-fp32, reference-compiled, y"):  # noted, not fatal
        bench.check("reference-compiled", bench.run("maefast-eager"))


HUNGRY = """
import torch

class Spec:
    name, sets = "hungry", 3
    def bench(self):
        self.kept = torch.ones(8 << 20)
        return self
    def run(self, contender):
        return lambda i: torch.ones(16 << 20).sum()

def workloads(full, device):
    return [Spec()]
"""


def test_peak_memory_is_the_high_water_mark_above_the_baseline(tmp_path, monkeypatch):
    (tmp_path / "hungry.py").write_text(HUNGRY)
    monkeypatch.syspath_prepend(tmp_path)
    assert (32 + 64) << 20 <= memory.peak_in_fresh_process("hungry", "hungry", "any", CPU, full=False) <= (32 + 64 + 16) << 20


@pytest.mark.parametrize(
    ("vendor", "family", "model", "name", "slug"),
    [
        ("AuthenticAMD", 25, 17, "AMD EPYC 9B14 96-Core Processor", "amd-epyc-zen4-2c"),
        ("AuthenticAMD", 26, 2, "AMD EPYC", "amd-epyc-zen5-2c"),
        ("AuthenticAMD", 99, 1, "AMD Oracle", "amd-f99m1-2c"),
        ("GenuineIntel", 6, 143, "Intel(R) Xeon(R) Platinum 8481C", "intel-xeon-sapphirerapids-2c"),
    ],
)
def test_machine_slug(vendor, family, model, name, slug):
    fields = {"processor": 0, "vendor_id": vendor, "cpu family": family, "model": model, "model name": name, "flags": "fpu"}
    text = "".join(f"{key}\t: {value}\n" for key, value in fields.items()) + "\n"
    assert machine.cpu_slug(text + text, cores=2) == slug


def results() -> dict:
    info = {"contender": "reference", "x_eager": 1.0, "bytes": 2_000_000, "commit": "0123abc"}
    info |= {"gb_per_s": 1.0, "copy_gb_per_s": 40.0, "copy_fraction": 0.025}
    fast = info | {"contender": "maefast-native", "x_eager": 8.0, "gb_per_s": 8.0, "copy_fraction": 0.2}
    slow = info | {"contender": "maefast-eager", "x_eager": 0.5, "gb_per_s": 0.5, "outside_error_rule": "off by 3"}
    runs = ((info, 2e-3, 1e-4), (fast, 2.5e-4, 1e-5), (slow, 4e-3, 1e-5))
    names = ("machine", "device", "threads", "system", "python", "torch", "maefast", "commit")
    return {
        "machine_info": {name: name for name in names} | {"size": "quick"},
        "benchmarks": [{"group": "op-fp32", "extra_info": i, "stats": {"median": t, "iqr": iqr}} for i, t, iqr in runs],
    }


def test_report_shows_losses_like_wins_and_leaves_out_empty_columns():
    lines = report.markdown(results()).splitlines()
    assert "| contender | median | IQR | x eager | GB/s | of copy |" in lines
    assert "| maefast-native | 250 us | 10 us | 8.00 | 8.0 | 20 % |" in lines
    assert "| maefast-eager (*) | 4 ms | 10 us | 0.50 | 0.5 | 2 % |" in lines
    assert "2.0 MB must be touched; a large copy ran at 40.0 GB/s. Commit 0123abc." in lines
    assert lines[-1] == "- off by 3"


PROBES = """
import machine, torch
print([machine.why_no_gemm(torch.device(device), dtype)
       for device, dtype in (("cpu", torch.float32), ("cpu", torch.bfloat16), ("cuda", torch.bfloat16))])
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN has other instruction sets here")
def test_a_cpu_without_a_bf16_product_has_no_rate_of_one():
    environment = os.environ | PYTHONPATH | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", PROBES], env=environment, capture_output=True, text=True)
    assert done.stdout == "[None, 'oneDNN has no product in bfloat16 on this CPU', None]\n", done.stderr


class TinyWorkload:
    """A contender that does nothing, and one that is compiled."""

    name, contenders, images, dtype = "any", ("any", "any-compiled"), None, torch.bfloat16
    eager_name = compiled_name = "any"

    def bench(self) -> Mock:
        bench = Mock(sets=1, bytes=None, flops=2_000_000_000)
        bench.why_not.return_value = None
        bench.run.return_value = lambda i: None
        return bench


def test_what_this_machine_cannot_measure_is_left_out_with_its_reason(monkeypatch):
    """A rate without its probe, a compiled contender without a compiler: the others stay."""
    monkeypatch.setattr(machine, "copy_probe", lambda device: lambda i: None)
    monkeypatch.setattr(machine, "why_no_gemm", lambda device, dtype: "there is no product")
    monkeypatch.setenv("CXX", "no-such-compiler")
    group = measure.Group(TinyWorkload(), "any", measure.Options(full=False, device=CPU))
    assert group.skipped == {"any-compiled": "torch.compile needs a C++ compiler, and there is no no-such-compiler"}
    assert set(group.samples) == {"any", measure.COPY}
    info = group.extra_info("any")
    assert info["why_no_gemm"] == "there is no product"
    assert not {"gemm_tflop_per_s", "gemm_fraction"} & info.keys()
    assert report.machine_rate(info) == "2.0 GFLOP; there is no product."


def test_a_forced_instruction_set_is_part_of_the_machine_s_name(monkeypatch):
    monkeypatch.delenv("MAEFAST_CPU_ISA", raising=False)
    name = machine.machine_slug(CPU)
    monkeypatch.setenv("MAEFAST_CPU_ISA", "auto")
    assert machine.machine_slug(CPU) == name
    monkeypatch.setenv("MAEFAST_CPU_ISA", "avx2")
    assert machine.machine_slug(CPU) == f"{name}-avx2"


def test_report_of_several_runs_has_each_group_once():
    early, late = results(), results()
    other = [bench | {"group": "other-fp32"} for bench in early["benchmarks"]]
    late["benchmarks"][0]["stats"]["median"] = 7.0
    merged = report.merged([early | {"benchmarks": early["benchmarks"] + other}, late])
    assert merged["benchmarks"] == late["benchmarks"] + other
    late["machine_info"]["machine"] = "another"
    with pytest.raises(ValueError, match="another"):
        report.merged([early, late])


def test_report_writes_a_chart_of_the_steps_beside_that_of_all_groups(tmp_path):
    pytest.importorskip("matplotlib")
    files = report.write(results(), tmp_path / "machine")
    assert [path.name for path in files] == ["quick.json", "quick.md", "quick.png"]
    assert json.loads(files[0].read_text()) == results()
    assert files[2].read_bytes().startswith(b"\x89PNG")
    steps = [bench | {"group": "step-fp32"} for bench in results()["benchmarks"]]
    files = report.write(results() | {"benchmarks": results()["benchmarks"] + steps}, tmp_path / "machine")
    assert [path.name for path in files] == ["quick.json", "quick.md", "quick.png", "quick-step.png"]
    assert files[3].read_bytes().startswith(b"\x89PNG")
    assert files[3].read_bytes() != files[2].read_bytes()
