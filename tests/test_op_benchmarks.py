"""The op benchmarks for GPUs, as far as a CPU shows them: inputs, SDPA's kernels, dtypes, names."""

import dataclasses
import importlib.util
from pathlib import Path

import machine
import pytest
import test_ops
import torch
from opbench import OpWorkload

FILE = Path(__file__).parent.parent / "benchmarks" / "test_blocks.py"  # tests/ has a module of this name
SPEC = importlib.util.spec_from_file_location("benchmarks_of_blocks", FILE)
test_blocks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(test_blocks)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ENTRIES = {entry.name: entry for entry in (*test_ops.ENTRIES, *test_blocks.ENTRIES)}
SDPA = ["sdpa-flash", "sdpa-cudnn", "sdpa-efficient"]


@pytest.mark.parametrize("name", ENTRIES)
def test_inputs_are_made_on_the_device(name):
    with torch.device("meta"):
        for variant in ENTRIES[name].variants:
            inputs = ENTRIES[name].make(2, variant, torch.Generator())
            assert {t.device.type for t in inputs.values()} == {"meta"}


def test_a_result_in_another_dtype_is_not_timed():
    def wrong(**inputs):
        return {"y": test_ops.plain_unshuffle(**inputs)["y"].double()}

    entry = dataclasses.replace(ENTRIES["unshuffle"], fused=wrong)
    bench = OpWorkload(entry, "fp32", 2, CPU).bench()
    with pytest.raises(AssertionError, match=r"y: is torch\.float64, the reference's torch\.float32"):
        bench.check("maefast-eager", bench.run("maefast-eager"))


def test_attention_on_a_gpu_meets_each_kernel_of_sdpa():
    entry = ENTRIES["attention_encoder"]
    on_cpu, on_gpu = (OpWorkload(entry, "bf16", 2, device).contenders for device in (CPU, CUDA))
    assert on_gpu == on_cpu + SDPA
    bench = OpWorkload(entry, "fp32", 2, CPU).bench()
    assert bench.why_not("sdpa-flash") is None
    bench.check("sdpa-flash", bench.run("sdpa-flash"))
    for name in SDPA[1:]:  # a CPU has neither
        assert "scaled_dot_product_attention" in bench.why_not(name)


def test_a_gpu_s_directory_of_results(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert machine.machine_slug(CUDA) == "h200"
