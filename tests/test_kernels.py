"""The Triton kernels in the interpreter: a process where TRITON_INTERPRET is set from the start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from maefast.kernels import HAS_TRITON

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_in_the_interpreter():
    command, env = [sys.executable, "-m", "pytest", "-q", "tests/kernels"], os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


def test_importing_maefast_imports_no_compiler():
    code = "import sys, maefast; print(any(name in sys.modules for name in ('triton', 'torch._dynamo')))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
