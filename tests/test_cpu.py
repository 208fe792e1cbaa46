"""The instruction set of the CPU kernels: the widest of this CPU, or MAEFAST_CPU_ISA's."""

import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from support import ISAS, ON_INTEL

import maefast
from maefast import cpu

NEEDS = {  # flags of /proc/cpuinfo
    "scalar": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512bf16": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"},
}
FLAGS = set(re.findall(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0].split())
OF_THIS_CPU = [name for name in ISAS if NEEDS[name] <= FLAGS]

FACTS = """
import subprocess, sys, torch, maefast
from maefast import _C, dispatch
print(_C.cpu_isa())
linear = dispatch.OPS["linear"]
for dtype in (torch.float32, torch.bfloat16):
    print(dispatch.choose(linear, linear.example(torch.device("cpu"), dtype)))
maefast.explain()
"""


def run_python(code: str, isa: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "MAEFAST_BACKEND"} | {"MAEFAST_CPU_ISA": isa}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("wanted", ["auto", *OF_THIS_CPU])
def test_one_instruction_set_for_a_process(native, wanted):
    """The kernels use it, `linear` is chosen by it, and explain() names it."""
    done = run_python(FACTS, wanted)
    assert done.returncode == 0, done.stderr
    used, fp32, bf16, first, *_ = done.stdout.splitlines()
    assert used == (OF_THIS_CPU[-1] if wanted == "auto" else wanted)
    assert (fp32 == "native") == (used in ("avx512", "avx512bf16") and not ON_INTEL)
    assert (bf16 == "native") == (used == "avx512bf16" and not ON_INTEL)
    why = "the widest instruction set of this CPU" if wanted == "auto" else "forced by MAEFAST_CPU_ISA"
    assert first == f"CPU kernels: {used}, {why}"


def test_an_unknown_instruction_set():
    for name in ("", "AVX2", "sse2"):
        with pytest.raises(ValueError, match=f"^MAEFAST_CPU_ISA must be one of .*; it is '{name}'$"):
            cpu._force(name)
    done = run_python("import maefast", "avx5")
    assert done.returncode != 0
    expected = "ValueError: MAEFAST_CPU_ISA must be one of auto, avx512bf16, avx512, avx2, scalar; it is 'avx5'"
    assert done.stderr.splitlines()[-1] == expected


def test_an_instruction_set_that_this_cpu_lacks(native, monkeypatch):
    monkeypatch.setattr(maefast._C, "set_cpu_isa", Mock(side_effect=ValueError))
    monkeypatch.setattr(maefast._C, "cpu_isa", lambda: "avx2")
    with pytest.raises(RuntimeError) as error:
        cpu._force("avx512")
    assert str(error.value) == "MAEFAST_CPU_ISA asks for avx512: the widest instruction set of this CPU is avx2"


@pytest.mark.skipif(OF_THIS_CPU[-1] == ISAS[-1], reason="this CPU has every instruction set")
def test_an_instruction_set_that_this_cpu_lacks_at_import(native):
    done = run_python("import maefast", ISAS[-1])
    assert done.returncode != 0
    expected = f"RuntimeError: MAEFAST_CPU_ISA asks for {ISAS[-1]}: the widest instruction set of this CPU is {OF_THIS_CPU[-1]}"
    assert done.stderr.splitlines()[-1] == expected


def test_without_the_native_library(monkeypatch):
    monkeypatch.setattr(cpu._library, "HAS_NATIVE", False)
    assert cpu._force("auto") is None
    with pytest.raises(RuntimeError) as error:
        cpu._force("avx2")
    why = "maefast was installed without its native library (MAEFAST_NATIVE=0)"
    assert str(error.value) == f"MAEFAST_CPU_ISA asks for avx2: {why}"
    with pytest.raises(ValueError, match="must be one of auto, avx512bf16, avx512, avx2, scalar; it is 'avx'"):
        cpu._force("avx")
    monkeypatch.setattr(cpu, "_ISA", None)
    assert not cpu.has_avx512()
    assert not cpu.multiplies_bf16()
    assert cpu.describe() == f"CPU kernels: none, {why}"
