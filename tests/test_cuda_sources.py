"""The CUDA sources without a GPU: machine code without spills, entries that refuse bad input."""

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
# Compiled together, since torch's headers take longer than most of the kernels.
UNITS = (("attention", "random_masking"), ("gather_patches", "masked_mse", "unshuffle"))

sys.path.append(str(ROOT / "scripts"))  # aot_table

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
    (torch.empty(1, 50, 180, **half), 3, None, "no kernel for heads 20 wide"),
    (torch.empty(1, 209, 384, **half), 2, None, "at most 208 tokens"),
    (torch.empty(1, 50, 384, **half), 5, None, "(N, T, 3 h d)"),
    (torch.empty(50, 384, **half), 2, None, "(N, T, 3 h d)"),
    (torch.empty(1, 50, 384, **half), 2, torch.empty(1, 50, 128, **half), "packed queries"),
):
    try:
        torch.ops.maefast.attention_fwd.default.redispatch(keys, q, qkv, h)
    except ValueError as error:
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
def objects(tmp_path_factory) -> dict[tuple[str, ...], tuple[Path, str]]:
    """Return the object of each unit for sm_90, with its boxed entries, and ptxas's report."""
    folder = tmp_path_factory.mktemp("cuda")
    defines = ["-DMAEFAST_ENTRY", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"]
    host = ["-Xcompiler", "-fPIC,-O0"]
    command = [NVCC, *FLAGS, "-arch=sm_90", "-Xptxas", "-v", *host, *defines, f"-isystem={TORCH / 'include'}"]

    def compiled(stems: tuple[str, ...]) -> tuple[Path, str]:
        source, out = (folder / f"{'_'.join(stems)}{suffix}" for suffix in (".cu", ".o"))
        source.write_text("".join(f'#include "{ROOT}/csrc/cuda/{stem}.cu"\n' for stem in stems))
        return out, run([*command, "-c", source, "-o", out])

    with ThreadPoolExecutor(len(UNITS)) as pool:
        return dict(zip(UNITS, pool.map(compiled, UNITS), strict=True))


def test_sources_are_built():
    listed = re.findall(r"csrc/cuda/(\w+)\.cu", (ROOT / "CMakeLists.txt").read_text())
    assert sorted(listed) == sorted(source.stem for source in SOURCES) == sorted(stem for unit in UNITS for stem in unit)


def test_no_spills_and_no_narrow_stores(objects):
    """But for what aot_cases.py explains."""
    aot, aot_cases = pytest.importorskip("aot"), pytest.importorskip("aot_cases")
    found, kernels = [], set()
    for out, said in objects.values():
        stacks = dict(re.findall(r"Function properties for (\w+)\n\s+(\d+) bytes stack frame", said))
        accesses = aot.accesses(out)
        assert stacks.keys() == accesses.keys()
        for symbol, stack in stacks.items():
            kernel, shape, _ = aot.named(symbol)
            kernels.add((kernel, shape.split(" ")[0]))
            found += aot_cases.problems(kernel, shape, int(stack), *accesses[symbol])
    assert {("attention_fwd_kernel", "32"), ("gather_patches_kernel", "8"), ("random_masking_kernel", "")} <= kernels
    assert not found


FAULTY = """
__global__ void faulty_kernel(float* y, const float* x, int n) {
  float kept[64];  // too many to be indexed in registers
#pragma unroll 1
  for (int i = 0; i < 64; ++i) kept[i] = x[i] * x[i + n];
  y[threadIdx.x] = kept[n];
}
__global__ void sound_kernel(float4* y, const float4* x) { __stcg(y + threadIdx.x, x[threadIdx.x]); }
"""


def test_what_the_table_must_not_have(tmp_path):
    """`make test-aot` fails if a kernel spills, or loads or stores 4 bytes at a time."""
    pytest.importorskip("triton")
    aot_table = pytest.importorskip("aot_table")
    source = tmp_path / "faulty.cu"
    source.write_text(FAULTY)
    found, problems = aot_table.of_cuda(NVCC, source, 90)
    assert {kernel: cell.stores for (kernel, _, _), cell in found.items()} == {"faulty_kernel": "4:1", "sound_kernel": "16:1"}
    assert problems == [
        "faulty_kernel of  keeps 256 bytes a thread in local memory on sm_90",
        "faulty_kernel of  has 2 loads of fewer than 8 bytes on sm_90",
        "faulty_kernel of  has 1 stores of fewer than 8 bytes on sm_90",
    ]


def test_entries(objects, tmp_path):
    stub, library = tmp_path / "stub.cpp", tmp_path / "libmaefast_cuda.so"
    stub.write_text(STUB)
    command = [NVCC, "-shared", "-Xcompiler", "-fPIC", *(out for out, _ in objects.values()), stub, "-o", library]
    run([*command, f"-L{TORCH / 'lib'}", "-ltorch_cpu"])
    script = tmp_path / "entry.py"
    script.write_text(ENTRY)
    assert run([sys.executable, script, library]).endswith("held\n")
