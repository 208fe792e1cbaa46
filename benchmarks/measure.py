"""Measurement of a group: the gate, the rotation, the peak memory, and derived figures."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import machine
import torch
from memory import peak_in_fresh_process
from rotation import NotOursError

from maefast.testing.timing import Budget, Run, rotate, timer_for

COPY, GEMM = "machine-copy", "machine-gemm"  # probes in the rotation


@dataclass(frozen=True)
class Options:
    full: bool
    device: torch.device
    only: frozenset[str] | None = None  # names of contenders

    def contenders(self, workload: Any) -> list[str]:
        return [name for name in workload.contenders if self.only is None or name in self.only]

    def budget(self, is_step: bool) -> Budget:
        if is_step and self.full and self.device.type != "cuda":
            return Budget(seconds=300, least=9, most=31)
        if is_step:
            return Budget(seconds=20 if self.full else 8, least=7, most=31)
        return Budget(2 if self.device.type == "cuda" else 12 if self.full else 3, least=11, most=61 if self.full else 41)


class Group:
    """The result of a workload: samples, reasons for skips, and figures of each contender."""

    def __init__(self, workload: Any, module: str, options: Options):
        self.workload, self.options = workload, options
        bench, names = workload.bench(), options.contenders(workload)
        self.skipped = {
            name: reason
            for name in names
            if (reason := bench.why_not(name) or (name.endswith("-compiled") and machine.why_not_compiled(options.device)))
        }
        runs = {name: bench.run(name) for name in names if name not in self.skipped}
        self.outside: dict[str, str] = {}
        for name, run in list(runs.items()):
            with self._if_it_fits(runs, name):
                try:
                    bench.check(name, run)
                except NotOursError as breach:
                    self.outside[name] = str(breach)
        self.bytes, self.flops = bench.bytes, bench.flops
        bench.forget()
        is_step = workload.images is not None
        self.peak = self._peaks_on_gpu(bench, runs) if is_step and options.device.type == "cuda" else {}
        self.why_no_gemm = machine.why_no_gemm(options.device, workload.dtype)
        probes = {COPY: machine.copy_probe(options.device)}
        if self.flops and self.why_no_gemm is None:
            probes[GEMM] = machine.gemm_probe(options.device, workload.dtype)
        timer, warmup = timer_for(options.device), 1 if is_step else 2  # the gate has run each contender already
        self.samples = rotate(runs | probes, timer, options.budget(is_step), bench.sets, warmup)
        self.median = {name: statistics.median(samples) for name, samples in self.samples.items()}
        del bench, runs, run
        torch._dynamo.reset()
        self.peak = self.peak or {
            name: peak_in_fresh_process(module, workload.name, name, options.device, options.full)
            for name in names
            if name not in self.skipped and (is_step or (options.full and options.device.type != "cuda"))
        }

    @contextmanager
    def _if_it_fits(self, runs: dict[str, Run], name: str) -> Iterator[None]:
        """Remove a contender from the group if it runs out of GPU memory within the block."""
        try:
            yield
        except torch.OutOfMemoryError:
            del runs[name]
            self.skipped[name] = "out of GPU memory"
            torch.cuda.empty_cache()

    def _peaks_on_gpu(self, bench: Any, runs: dict[str, Run]) -> dict[str, int]:
        """Return the bytes that torch allocates for a step, with weights, moments and batch.

        A fresh process would compile again. The private pool of a CUDA graph is not counted.
        """
        peaks = {}
        for name, run in list(runs.items()):
            with self._if_it_fits(runs, name):
                run(0)
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                run(1)
                if name != bench.graphed:
                    peaks[name] = torch.cuda.max_memory_allocated() - before + bench.held_bytes
        return peaks

    def extra_info(self, contender: str) -> dict[str, Any]:
        seconds = self.median[contender]
        size = "full" if self.options.full else "quick"
        info: dict[str, Any] = {"group": self.workload.name, "contender": contender, "size": size}
        for label, name in (("x_eager", self.workload.eager_name), ("x_compiled", self.workload.compiled_name)):
            if name in self.median:
                info[label] = self.median[name] / seconds
        if self.bytes:
            copy_rate = machine.COPY_BYTES / self.median[COPY]
            info |= {"bytes": self.bytes, "gb_per_s": self.bytes / seconds / 1e9}
            info |= {"copy_gb_per_s": copy_rate / 1e9, "copy_fraction": self.bytes / seconds / copy_rate}
        if self.flops:
            info |= {"flops": self.flops, "tflop_per_s": self.flops / seconds / 1e12}
            if GEMM in self.median:
                gemm_rate = machine.gemm_flops(self.options.device) / self.median[GEMM]
                info |= {"gemm_tflop_per_s": gemm_rate / 1e12, "gemm_fraction": self.flops / seconds / gemm_rate}
            else:
                info["why_no_gemm"] = self.why_no_gemm
            if (nominal := machine.nominal_flops(self.options.device, self.workload.dtype)) is not None:
                info["nominal_fraction"] = self.flops / seconds / nominal
        if self.workload.images:
            info["images_per_s"] = self.workload.images / seconds
        if contender in self.peak:
            info["peak_memory_mb"] = self.peak[contender] / 1e6
        if contender in self.outside:
            info["outside_error_rule"] = self.outside[contender]
        rounded = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in info.items()}
        return rounded | machine.describe(self.options.device)
