"""A description of this machine without host or user, and probes of its copy and GEMM rates."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

COPY_BYTES = 2 * (256 << 20)  # the copy probe reads and writes 256 MiB, more than any cache holds
GEMM_N = {"cpu": 2048, "cuda": 8192}  # large enough for the best rate of the device
NOMINAL = {"H100 80GB HBM3": 989.4e12, "H200": 989.4e12}  # dense FLOP/s in 16 bits by NVIDIA's data sheets, by part of the name

ZEN = {  # family -> (first model, name), ascending
    0x17: ((0x00, "zen"), (0x08, "zen+"), (0x10, "zen"), (0x18, "zen+"), (0x30, "zen2")),
    0x19: ((0x00, "zen3"), (0x10, "zen4"), (0x20, "zen3"), (0x60, "zen4"), (0x80, "zen3"), (0xA0, "zen4")),
    0x1A: ((0x00, "zen5"),),
}
INTEL = {63: "haswell", 79: "broadwell", 85: "skylake", 106: "icelake", 108: "icelake", 143: "sapphirerapids",
         207: "emeraldrapids", 173: "graniterapids"}  # fmt: skip
BRANDS = ("epyc", "ryzen", "threadripper", "xeon", "core")


CPUINFO = Path("/proc/cpuinfo")


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def cpu_slug(cpuinfo: str, cores: int) -> str:
    """Return a name such as amd-epyc-zen4-2c from the text of /proc/cpuinfo."""
    fields = dict(re.findall(r"^([^\t:]+?)\s*:[ \t]*(.*)$", cpuinfo.split("\n\n")[0], re.MULTILINE))
    vendor = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}.get(fields.get("vendor_id", ""))
    if vendor is None:
        return f"{slug(platform.machine() or 'cpu')}-{cores}c"
    family, model = int(fields["cpu family"]), int(fields["model"])
    if vendor == "amd":
        kind = next((name for first, name in reversed(ZEN.get(family, ())) if model >= first), None)
    else:
        kind = INTEL.get(model) if family == 6 else None
    words = slug(fields.get("model name", "")).split("-")
    brand = next((word for word in BRANDS if word in words), None)
    return "-".join(part for part in (vendor, brand, kind or f"f{family}m{model}", f"{cores}c") if part)


def machine_slug(device: torch.device) -> str:
    if device.type == "cuda":
        return slug(torch.cuda.get_device_name(device)).removeprefix("nvidia-")
    forced = os.environ.get("MAEFAST_CPU_ISA", "auto")  # results of a forced narrower instruction set do not describe the machine
    return cpu_slug(CPUINFO.read_text() if CPUINFO.exists() else "", torch.get_num_threads()) + f"-{forced}" * (forced != "auto")


def cpu_model() -> str:
    names = re.findall(r"^model name\s*:\s*(.*)$", CPUINFO.read_text(), re.MULTILINE) if CPUINFO.exists() else []
    return names[0] if names else platform.machine()


def commit() -> str:
    """Return the commit of this checkout, with "+" if tracked files differ, or "unknown"."""

    def git(*args: str) -> str:
        return subprocess.check_output(["git", *args], cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True).strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@cache
def describe(device: torch.device) -> dict[str, Any]:
    """Return versions and hardware, without the names of host, user or paths."""
    import maefast

    return {
        "machine": machine_slug(device),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "maefast": maefast.__version__,
        "commit": commit(),
    }


def copy_probe(device: torch.device) -> Callable[[int], Any]:
    """Return a large copy between preallocated tensors. It moves COPY_BYTES, reads and writes."""
    source = torch.ones(COPY_BYTES // 2, dtype=torch.uint8, device=device).view(torch.float32)
    target = torch.empty_like(source)
    return lambda i: target.copy_(source)


def gemm_flops(device: torch.device) -> int:
    return 2 * GEMM_N[device.type] ** 3


def nominal_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the data sheet's FLOP/s of 16-bit matrix products, or None if unknown."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in NOMINAL.items() if part in name), None)


def _matmul(x: Tensor, w: Tensor) -> Tensor:
    """Multiply; on a CPU with oneDNN if torch has it, since MKL's sgemm is slower on AMD."""
    if x.device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return F.linear(x, w)


@cache
def why_no_gemm(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the rate of matrix products in `dtype` cannot be measured here, or None."""
    if device.type != "cpu":
        return None
    try:
        _matmul(*torch.ones(2, 16, 16, dtype=dtype))
    except RuntimeError:
        return f"oneDNN has no product in {str(dtype).removeprefix('torch.')} on this CPU"
    return None


def gemm_probe(device: torch.device, dtype: torch.dtype) -> Callable[[int], Any]:
    """Return a square matrix product of gemm_flops."""
    size = GEMM_N[device.type]
    x, w = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda i: _matmul(x, w)


def why_not_compiled(device: torch.device) -> str | None:
    """Return why torch.compile cannot make code for `device`, or None."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler, and there is no {compiler}"
    return None
