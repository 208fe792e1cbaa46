"""attention(qkv, num_heads) on a GPU: builds the kernels alone, checks them against float64, times
them against SDPA.

    python scripts/gpu_attention.py [--no-timing]

Needs torch with CUDA and nvcc. Writes attention.json and the build log to $OUT (or build/gpu) and
prints a short table last.
"""

import argparse
import ctypes
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
OUT = Path(os.environ.get("OUT", ROOT / "build" / "gpu"))
SHAPES = [(50, 12, 64), (50, 16, 64), (65, 16, 80), (197, 16, 32), (257, 16, 32)]  # (T, h, d)
# forward + backward at least twice as fast as SDPA
BARS = {(50, 12, 64), (65, 16, 80), (197, 16, 32)}
RAGGED = (1, 2, 7, 49, 50, 63, 64, 65, 66, 196, 197, 198, 256, 257, 288)
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
EPS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
C_INTERFACE = """
#include "attention.cu"
using namespace maefast::cuda;
extern "C" int tokens(long long d) { return attention_tokens(d); }
extern "C" const char* message(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
extern "C" int fwd(const void* qkv, void* out, float* lse, long long N, int T, int h, int d, int bf16, void* stream) {
  const AttentionFwd args{.qkv = qkv, .out = out, .lse = lse, .N = N, .T = T, .h = h, .d = d, .bf16 = bf16 != 0};
  return attention_fwd(args, static_cast<cudaStream_t>(stream));
}
extern "C" int bwd(const void* qkv, const void* out, const float* lse, const void* dout, void* dqkv, long long N, int T, int h,
                   int d, int bf16, void* stream) {
  const AttentionBwd args{
      .qkv = qkv, .out = out, .lse = lse, .dout = dout, .dqkv = dqkv, .N = N, .T = T, .h = h, .d = d, .bf16 = bf16 != 0};
  return attention_bwd(args, static_cast<cudaStream_t>(stream));
}
"""


def build() -> ctypes.CDLL:
    OUT.mkdir(parents=True, exist_ok=True)
    work = ROOT / "build" / "gpu"
    work.mkdir(parents=True, exist_ok=True)
    source, library = work / "attention_c.cu", work / "attention_c.so"
    source.write_text(C_INTERFACE)
    nvcc = next((p for p in ("/usr/local/cuda/bin/nvcc", "/usr/local/cuda-13.0/bin/nvcc") if Path(p).exists()), "nvcc")
    command = [nvcc, "-std=c++20", "-O3", "-arch=sm_90", "-lineinfo", "-Xptxas", "-v", "-shared", "-Xcompiler", "-fPIC"]
    command += ["-I", str(ROOT / "csrc" / "cuda"), str(source), "-o", str(library)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    (OUT / "attention_build.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        sys.exit((done.stdout + done.stderr)[-4000:])
    frames = done.stderr.count("bytes stack frame") - done.stderr.count(" 0 bytes stack frame")
    print(f"built in {time.perf_counter() - start:.0f} s; kernels with a stack frame: {frames}")
    lib = ctypes.CDLL(str(library))
    lib.message.restype = ctypes.c_char_p
    lib.tokens.argtypes = [ctypes.c_longlong]
    p, i, n = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong
    lib.fwd.argtypes = [p, p, p, n, i, i, i, i, p]
    lib.bwd.argtypes = [p, p, p, p, p, n, i, i, i, i, p]
    return lib


class Ours:
    """The kernels on preallocated outputs."""

    def __init__(self, lib, qkv, dout, h):
        self.lib, self.qkv, self.dout, self.h = lib, qkv, dout, h
        N, T, width = dout.shape
        self.args = (N, T, h, width // h, int(qkv.dtype == torch.bfloat16))
        self.out = guarded(dout.shape, qkv.dtype)
        self.dqkv = guarded(qkv.shape, qkv.dtype)
        self.lse = guarded((N, h, T), torch.float32)

    def check(self, error):
        if error:
            raise RuntimeError(self.lib.message(error).decode())

    def forward(self):
        stream = torch.cuda.current_stream().cuda_stream
        self.check(self.lib.fwd(self.qkv.data_ptr(), self.out.data_ptr(), self.lse.data_ptr(), *self.args, stream))

    def backward(self):
        stream = torch.cuda.current_stream().cuda_stream
        self.check(
            self.lib.bwd(
                self.qkv.data_ptr(),
                self.out.data_ptr(),
                self.lse.data_ptr(),
                self.dout.data_ptr(),
                self.dqkv.data_ptr(),
                *self.args,
                stream,
            )
        )

    def both(self):
        self.forward()
        self.backward()

    def untouched(self):
        """Whether the 4 KiB before and after every output are as they were."""
        return all(bool((edge == 77).all()) for t in (self.out, self.dqkv, self.lse) for edge in t.edges)


def guarded(shape, dtype):
    """A tensor full of NaN between two guards."""
    count, pad = int(torch.Size(shape).numel()), 4096
    raw = torch.full((2 * pad + count * dtype.itemsize,), 77, dtype=torch.uint8, device="cuda")
    t = raw[pad : pad + count * dtype.itemsize].view(dtype).view(shape)
    t.fill_(float("nan"))
    t.edges = (raw[:pad], raw[pad + count * dtype.itemsize :])
    return t


def eager(qkv, dout, h):
    """The plain formula in the dtype of qkv: out, dqkv."""
    N, T, width = dout.shape
    qkv = qkv.detach().requires_grad_()
    q, k, v = qkv.view(N, T, 3, h, width // h).permute(2, 0, 3, 1, 4)
    out = ((q @ k.transpose(-2, -1)) * (width // h) ** -0.5).softmax(-1) @ v
    out = out.transpose(1, 2).reshape(N, T, width)
    return out.detach(), torch.autograd.grad(out, qkv, dout)[0]


def parts(out, dqkv):
    """out, dq, dk, dv in float64."""
    return dict(zip(("out", "dq", "dk", "dv"), (out.double(), *dqkv.double().chunk(3, dim=-1)), strict=True))


def errors(got, ref):
    """Relative L2 error of each part; a gradient that vanishes is measured against all of them."""
    whole = torch.stack([ref[k].norm() for k in ("dq", "dk", "dv")]).norm()
    return {
        k: float((got[k] - ref[k]).norm() / (ref[k].norm() if k == "out" else torch.maximum(ref[k].norm(), 1e-3 * whole)))
        for k in ref
    }


def inputs(N, T, h, d, dtype, kind="random"):
    qkv = torch.randn(N, T, 3 * h * d, device="cuda")
    if kind == "equal":
        qkv[..., : h * d] = 0  # every score is 0
    if kind == "extreme":  # scores of up to +-1e4
        q, k, _ = qkv.view(N, T, 3, h, d).unbind(2)
        q.copy_(torch.where(q > 0, 1.0, -1.0) * (1e4 / d**0.5) ** 0.5)
        k.copy_(torch.where(k[:, :, :, :1] > 0, 1.0, -1.0) * (1e4 / d**0.5) ** 0.5 * torch.where(q[:, :1] > 0, 1.0, -1.0))
    return qkv.to(dtype), torch.randn(N, T, h * d, device="cuda").to(dtype)


def correctness(lib):
    """Checks every size; returns the rows and the failures."""
    rows, failed = [], []
    for dtype in (torch.bfloat16, torch.float16):
        for d in (32, 64, 80):
            for T in RAGGED:
                if lib.tokens(d) < T:
                    rows.append({"T": T, "d": d, "skipped": f"at most {lib.tokens(d)} tokens"})
                    continue
                for kind in ("random", "equal", "extreme"):
                    torch.manual_seed(T * 100 + d)
                    h = 3
                    qkv, dout = inputs(2, T, h, d, dtype, kind)
                    ours = Ours(lib, qkv, dout, h)
                    ours.both()
                    torch.cuda.synchronize()
                    again = Ours(lib, qkv, dout, h)
                    again.both()
                    torch.cuda.synchronize()
                    got = parts(ours.out, ours.dqkv)
                    ref = parts(*eager(qkv.double(), dout.double(), h))
                    low = parts(*eager(qkv, dout, h))
                    error, bar = errors(got, ref), errors(low, ref)
                    problems = [k for k in got if not bool(got[k].isfinite().all())]
                    if kind != "extreme":
                        problems += [
                            f"{k} {error[k]:.1e} > 2 x {bar[k]:.1e} + eps"
                            for k in error
                            if not error[k] <= 2 * bar[k] + EPS[dtype]
                        ]
                    if not torch.equal(ours.out.view(torch.int16), again.out.view(torch.int16)) or not torch.equal(
                        ours.dqkv.view(torch.int16), again.dqkv.view(torch.int16)
                    ):
                        problems.append("two runs differ")
                    if not ours.untouched():
                        problems.append("wrote outside")
                    name = f"{str(dtype)[6:]} T={T} d={d} {kind}"
                    rows.append({"case": name, "error": error, "eager": bar, "problems": problems})
                    if problems:
                        failed.append(f"{name}: {', '.join(problems)}")
    return rows, failed


def captured(run):
    """`run` as a CUDA graph, so that no contender waits for the CPU."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        keep = run()
    graph.keep = keep
    return graph.replay


def sdpa_runs(qkv, dout, h, backend):
    N, T, width = dout.shape
    leaf = qkv.detach().requires_grad_()

    def forward(x):
        q, k, v = x.view(N, T, 3, h, width // h).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, T, width)

    def fwd():
        with sdpa_kernel(backend), torch.no_grad():
            return forward(qkv)

    def both():
        with sdpa_kernel(backend):
            return torch.autograd.grad(forward(leaf), leaf, dout)[0]

    return fwd, both


def rotate(runs, rounds):
    """Median milliseconds of each run, one after the other in a shuffled order, each behind a write
    that evicts the L2."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    samples = {name: [] for name in runs}
    for r in range(-2, rounds):
        for name in random.Random(r).sample(list(runs), len(runs)):
            flush.zero_()
            start.record()
            runs[name]()
            end.record()
            end.synchronize()
            if r >= 0:
                samples[name].append(start.elapsed_time(end))
    return {name: statistics.median(s) for name, s in samples.items()}


def traffic(N, T, h, d):
    """Bytes that must be moved (forward, backward) and those the backward's delta adds where it
    reads O."""
    token = N * T * h * d * 2
    return 4 * token, (7 if T <= 80 else 8) * token


def timing(lib, batches, rounds):
    results = []
    for N in batches:
        for T, h, d in SHAPES:
            qkv, dout = inputs(N, T, h, d, torch.bfloat16)
            runs, missing = {}, {}
            ours = Ours(lib, qkv, dout, h)
            ours.both()
            runs["ours fwd"], runs["ours bwd"], runs["ours both"] = (
                captured(f) for f in (ours.forward, ours.backward, ours.both)
            )
            for name, backend in BACKENDS.items():
                for what, run in zip(("fwd", "both"), sdpa_runs(qkv, dout, h, backend), strict=True):
                    try:
                        run()
                        torch.cuda.synchronize()
                    except RuntimeError as error:  # a backend that refuses the shape is a result
                        missing[name] = str(error).splitlines()[0][:200]
                        continue
                    try:
                        runs[f"{name} {what}"] = captured(run)
                    except RuntimeError as error:
                        missing[name] = f"not as a graph: {str(error).splitlines()[0][:200]}"
                        torch.cuda.synchronize()
                        runs[f"{name} {what}"] = run
            ms = rotate(runs, rounds)
            best = {what: min((ms[f"{n} {what}"], n) for n in BACKENDS if f"{n} {what}" in ms) for what in ("fwd", "both")}
            fwd_bytes, bwd_bytes = traffic(N, T, h, d)
            row = {"N": N, "T": T, "h": h, "d": d, "ms": ms, "missing": missing, "best": best}
            row["gbs_fwd"], row["gbs_bwd"] = fwd_bytes / ms["ours fwd"] / 1e6, bwd_bytes / ms["ours bwd"] / 1e6
            row["ratio_fwd"], row["ratio_both"] = best["fwd"][0] / ms["ours fwd"], best["both"][0] / ms["ours both"]
            results.append(row)
            del runs, ours, qkv, dout
            torch.cuda.empty_cache()
    return results


def copy_rate():
    a, b = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * a.numel() / rotate({"copy": lambda: b.copy_(a)}, 10)["copy"] / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--no-timing", action="store_true")
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    begin = time.perf_counter()
    lib = build()
    report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}

    def save():
        (OUT / "attention.json").write_text(json.dumps(report, indent=1))

    rows, failed = correctness(lib)
    report["correctness"], report["failed"] = rows, failed
    save()
    checked = [r for r in rows if "case" in r]
    print(f"{len(checked)} cases checked, {len(failed)} failed ({time.perf_counter() - begin:.0f} s)")
    print("\n".join(failed[:30]))
    if failed:
        sys.exit(1)
    if not args.no_timing:
        report["copy_gbs"] = copy_rate()
        report["timing"] = timing(lib, (256, 1024), args.rounds)
        save()
    if not args.no_timing:
        print(f"{report['device']}, copy {report['copy_gbs']:.0f} GB/s; milliseconds, bf16, medians")
        names = ["ours", *BACKENDS]
        print(
            f"{'N':>5} {'T':>4} {'h':>3} {'d':>3} | fwd: "
            + " ".join(f"{n:>9}" for n in names)
            + "   x | fwd+bwd: "
            + " ".join(f"{n:>9}" for n in names)
            + "   x | GB/s fwd bwd"
        )
        for r in report["timing"]:
            cells = ["  ".join(f"{r['ms'].get(f'{n} {what}', float('nan')):8.3f}" for n in names) for what in ("fwd", "both")]
            flag = "" if r["ratio_both"] >= 2 or (r["T"], r["h"], r["d"]) not in BARS else "  MISSED"
            shape, ratios = " ".join(f"{r[x]:4d}" for x in "NThd"), (r["ratio_fwd"], r["ratio_both"])
            rates = f"{r['gbs_fwd']:5.0f} {r['gbs_bwd']:5.0f}{flag}"
            print(f"{shape} | {cells[0]} {ratios[0]:4.2f} | {cells[1]} {ratios[1]:4.2f} | {rates}")
        for r in report["timing"]:
            for name, why in r["missing"].items():
                print(f"T={r['T']} d={r['d']} {name}: {why}")
    print(f"total {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
