"""The CUDA sources without a GPU: machine code without spills, and boxed entries that torch knows and that refuse bad input."""

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TORCH = Path(torch.__file__).parent
NVCC = shutil.which("nvcc")
FLAGS = ["-std=c++20", "-O3"]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))

pytestmark = pytest.mark.skipif(NVCC is None, reason="there is no nvcc on PATH")

# What torch_cuda would provide: without a GPU nothing gets as far as a launch.
STUB = """
#include <cstdint>
extern "C" int aoti_torch_get_current_cuda_stream(int32_t, void** stream) { *stream = nullptr; return 0; }
"""

# Calls a CUDA entry with CPU tensors: it checks sizes and dtypes before it looks at devices.
ENTRY = """
import sys, torch, maefast
torch.ops.load_library(sys.argv[1])
for name in (
    "random_masking_fwd", "gather_patches_fwd", "mask_patches_fwd", "unshuffle_fwd", "unshuffle_bwd", "masked_mse_fwd",
    "masked_mse_bwd", "attention_fwd", "attention_bwd",
):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"maefast::{name}", "CUDA"), name
keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
half = dict(dtype=torch.bfloat16)
for qkv, h, q, expected in (
    (torch.empty(1, 50, 384), 2, None, "bfloat16 and float16"),
    (torch.empty(1, 50, 180, **half), 3, None, "32, 64 or 80"),
    (torch.empty(1, 209, 384, **half), 2, None, "at most 208 tokens"),
    (torch.empty(1, 50, 384, **half), 5, None, "(N, T, 3 h d)"),
    (torch.empty(50, 384, **half), 2, None, "(N, T, 3 h d)"),
    (torch.empty(1, 50, 384, **half), 2, torch.empty(1, 50, 128, **half), "packed queries"),
):
    try:
        torch.ops.maefast.attention_fwd.default.redispatch(keys, q, qkv, h)
    except (ValueError, RuntimeError) as error:
        assert expected in str(error), error
    else:
        raise AssertionError(f"{expected}: no error")
print("held")
"""


def run(command: list[str | Path]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """Of each source: the object for sm_90 with its boxed entries, and what ptxas said of it."""
    folder = tmp_path_factory.mktemp("cuda")
    defines = ["-DMAEFAST_ENTRY", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"]
    command = [NVCC, *FLAGS, "-arch=sm_90", "-Xptxas", "-v", "-Xcompiler", "-fPIC", *defines, f"-isystem={TORCH / 'include'}"]

    def compiled(source: Path) -> tuple[Path, str]:
        out = folder / f"{source.stem}.o"
        return out, run([*command, "-c", source, "-o", out])

    with ThreadPoolExecutor(2) as pool:
        return dict(zip((source.stem for source in SOURCES), pool.map(compiled, SOURCES), strict=True))


def test_sources_are_built():
    listed = re.findall(r"csrc/cuda/(\w+)\.cu", (ROOT / "CMakeLists.txt").read_text())
    assert sorted(listed) == sorted(source.stem for source in SOURCES)


def test_no_spills(objects):
    """But for one entry: heads of 64 with up to 208 tokens backward, whose 416 threads leave 128 registers to each."""
    for stem, (_, said) in objects.items():
        stack = [int(bytes_) for bytes_ in re.findall(r"(\d+) bytes stack frame", said)]
        assert stack, "ptxas reports each kernel"
        if stem != "attention":
            assert set(stack) == {0}, stem
    stack = {
        (kernel, half, values): int(bytes_)
        for kernel, half, values, bytes_ in re.findall(
            r"properties for \w*?(attention_[a-z_]+_kernel)INS0_\d(F16|Bf16)E(\w*?)EEEv\w*\n\s+(\d+) bytes stack frame",
            objects["attention"][1],
        )
    }
    assert len(stack) > 15, "the pattern finds the kernels"
    for half in ("F16", "Bf16"):
        assert stack.pop(("attention_bwd_long_kernel", half, "Li64ELi1ELi208ELi13ELb0ELb0ELi416ELi1")) <= 24
    assert set(stack.values()) == {0}


def test_entries(objects, tmp_path):
    stub, library = tmp_path / "stub.cpp", tmp_path / "libmaefast_cuda.so"
    stub.write_text(STUB)
    command = [NVCC, "-shared", "-Xcompiler", "-fPIC", *(out for out, _ in objects.values()), stub, "-o", library]
    run([*command, f"-L{TORCH / 'lib'}", "-ltorch_cpu"])
    script = tmp_path / "entry.py"
    script.write_text(ENTRY)
    assert run([sys.executable, script, library]).endswith("held\n")
