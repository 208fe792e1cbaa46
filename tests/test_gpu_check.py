"""scripts/gpu_check.sh as a process, with stand-ins for Python and a sanitizer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "gpu_check.sh"

# Notes its arguments; does what the file `actions` says for a command that holds one of its words.
PYTHON = """#!/bin/bash
[[ $1 == - ]] && exit 0
echo "$*" >> "$(dirname "$0")/calls"
echo "output of $*"
while read -r word action; do [[ "$*" == *"$word"* ]] && eval "$action"; done < "$(dirname "$0")/actions"
[[ "$*" =~ --benchmark-json=([^ ]*) ]] && echo {} > "${BASH_REMATCH[1]}"
exit 0
"""
SANITIZER = """#!/bin/bash
echo "sanitizer $2 ${PYTORCH_NO_CUDA_MEMORY_CACHING}" >> "$(dirname "$0")/calls"
"""


def check(tmp_path: Path, actions: str = "", sanitizer: bool = True, **env: str) -> tuple[int, list[str], list[str]]:
    """Return the exit status, the table at the end and the commands that ran."""
    tools = {"python": PYTHON} | ({"compute-sanitizer": SANITIZER} if sanitizer else {})
    for name, text in tools.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "actions").write_text(actions)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")} | env
    done = subprocess.run([SCRIPT], env=environment | {"PYTHON": str(tmp_path / "python")}, capture_output=True, text=True)
    table = done.stdout.split(f"logs and results in {tmp_path}/out\n")
    calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    return done.returncode, (table[1] if len(table) == 2 else done.stderr).splitlines(), calls


def parts(table: list[str]) -> list[str]:
    return [line.split()[0] for line in table]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path):
    """One line, at once, and nothing is built or written."""
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    done = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True, timeout=60)
    message = f"gpu-check needs a GPU that torch can use; torch {torch.__version__} finds none\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
    assert not (tmp_path / "out").exists()


def test_everything_in_order(tmp_path):
    status, table, calls = check(tmp_path)
    assert status == 0
    names = ["build", "tests-cuda", "tests-triton", "sanitizer-memcheck", "sanitizer-racecheck", "attention", "ops", "blocks"]
    names += ["report-ops", "step-vit_b16", "step-vit_b16_batch8", "step-vit_l16", "step-vit_h14", "report-step"]
    assert parts(table) == names
    assert all(" passed, " in line for line in table)
    tests = ["-m pytest -q tests/gpu", "-m pytest -q tests/kernels", "sanitizer memcheck 1", "sanitizer racecheck 1"]
    assert calls[:5] == ["setup.py build_ext --inplace", *tests]
    assert calls[-1].count("step-vit_") == 4
    assert calls[-1].startswith("benchmarks/report.py")
    arguments = f"--benchmark-only --full --device cuda --benchmark-json={tmp_path}/out/ops.json benchmarks/test_ops.py"
    assert (tmp_path / "out" / "ops.log").read_text() == f"output of -m pytest -q {arguments} -k (bf16 or autocast)\n"


def test_parts(tmp_path):
    status, table, _ = check(tmp_path, GPU_CHECK="tests", sanitizer=False)
    assert (status, parts(table)) == (0, ["build", "tests-cuda", "tests-triton"])
    assert check(tmp_path, GPU_CHECK="tune")[2][-1] == f"-m maefast.kernels.tune --output {tmp_path}/out/tuned.json"
    status, said, _ = check(tmp_path, GPU_CHECK="tests speed")
    assert (status, said) == (2, ["GPU_CHECK must be of tests, ops, step, tune; it is 'tests speed'"])


def test_rehearsal(tmp_path):
    status, table, calls = check(tmp_path, DEVICE="cpu", sanitizer=False)
    assert status == 0
    names = ["build", "tests-cuda", "tests-triton", "attention", "ops", "blocks", "report-ops", "step-tiny", "report-step"]
    assert parts(table) == names
    assert all("--device cpu" in call and "--full" not in call for call in calls if "--benchmark-only" in call)
    assert check(tmp_path, DEVICE="cpu", GPU_CHECK="ops tune")[:2] == (2, ["GPU_CHECK=tune needs a GPU; DEVICE is cpu"])
    assert check(tmp_path, DEVICE="tpu")[:2] == (2, ["DEVICE must be cuda or cpu; it is 'tpu'"])


def test_a_failure_does_not_stop_the_rest(tmp_path):
    status, table, calls = check(tmp_path, "attention.json exit 3\nstep-vit_l16 exit 1\n", GPU_CHECK="ops step")
    assert status == 1
    found = {line.split()[0]: line.split(maxsplit=1)[1].rsplit(",", 1)[0] for line in table}
    assert found.pop("attention") == "FAILED with status 3"
    assert found.pop("step-vit_l16") == "FAILED with status 1"
    assert set(found.values()) == {"passed"}
    assert {"report-ops", "report-step"} <= found.keys()
    assert "step-vit_b16.json" in calls[-1], "it has what there is"
    assert "step-vit_l16.json" not in calls[-1]


def test_nothing_runs_on_a_build_that_failed(tmp_path):
    status, table, calls = check(tmp_path, "build_ext exit 1\n")
    assert status == 1
    assert [line.split()[:2] for line in table] == [["build", "FAILED"]]
    assert len(calls) == 1


def test_time_runs_out(tmp_path):
    status, table, calls = check(tmp_path, "tests/gpu sleep 60\n", GPU_CHECK_SECONDS="3", GPU_CHECK="tests ops")
    assert status == 1
    assert [line.split()[1] for line in table[:3]] == ["passed,", "stopped,", "skipped,"]
    assert parts(table[:3]) == ["build", "tests-cuda", "tests-triton"]
    assert all("skipped" in line for line in table[2:])
    assert len(calls) == 2
