"""Peak memory of one contender in a fresh process: the high-water mark minus the baseline.

`python benchmarks/memory.py MODULE WORKLOAD CONTENDER DEVICE quick|full` prints {"peak_bytes": N}.
"""

import ctypes
import gc
import importlib
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import torch

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _bytes_of(entry: str) -> int:
    found = re.search(rf"^{entry}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE) if STATUS.exists() else None
    return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def resident() -> int:
    return _bytes_of("VmRSS")


def high_water() -> int:
    return _bytes_of("VmHWM")


def forget_high_water() -> None:
    """Return free memory to the system, and reset the high-water mark if the kernel allows it."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR_REFS.write_text("5")
    except (AttributeError, OSError):
        pass


def peak(module: str, workload: str, contender: str, device: torch.device, full: bool) -> int:
    """Return the peak bytes above the baseline, with weights, gradients and optimizer state."""
    spec = next(w for w in importlib.import_module(module).workloads(full, device) if w.name == workload)
    if contender.endswith("compiled"):
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))  # the compiler's own modules belong to the baseline
    if device.type == "cuda":
        run = spec.bench().run(contender)
        run(0)
        torch.cuda.reset_peak_memory_stats()
        run(1)
        return torch.cuda.max_memory_allocated()
    forget_high_water()
    baseline = resident()
    bench = spec.bench()
    run = bench.run(contender)
    run(0)
    forget_high_water()
    for i in range(1, bench.sets):
        run(i)
    return high_water() - baseline


def peak_in_fresh_process(module: str, workload: str, contender: str, device: torch.device, full: bool) -> int:
    command = [sys.executable, __file__, module, workload, contender, str(device), "full" if full else "quick"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the peak memory of {workload}, {contender} could not be measured:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])["peak_bytes"]


if __name__ == "__main__":
    _, module, workload, contender, device, size = sys.argv
    print(json.dumps({"peak_bytes": peak(module, workload, contender, torch.device(device), size == "full")}))
