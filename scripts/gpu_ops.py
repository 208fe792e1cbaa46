"""The Triton ops on a GPU: checked against float64 by the error rule, then timed against plain torch, eager and compiled, and
against those in CUDA C++ where they were built (tests/gpu checks these).

    PYTHONPATH=. python3 scripts/gpu_ops.py [--seconds 100]

Writes ops.json to $OUT (build/gpu by default) and prints one table last. Time is a median over rounds in which every contender
runs once, on inputs that rotate, with a cold L2 cache; GB/s counts the bytes that must be touched, each once.
"""

import argparse
import json
import os
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
warnings.filterwarnings("ignore", message="maefast runs without")

import maefast  # noqa: E402
from maefast import _library, ops  # noqa: E402
from maefast.testing.errors import assert_close_to_float64, relative_errors  # noqa: E402
from maefast.testing.timing import Budget, CudaTimer, rotate  # noqa: E402

F32, BF16, F16, U8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8
DTYPES = {  # images; patches, x and pred; mask token and positions
    "fp32": (F32, F32, F32),
    "amp": (F32, BF16, F32),
    "bf16": (BF16, BF16, BF16),
    "fp16": (F16, F16, F16),
    "uint8": (U8, BF16, F32),
}
GEOMETRIES = {"B": (16, 14), "H": (14, 16)}  # patch, grid; ViT-L is as ViT-B here
C, DECODER, EPS = 3, 512, 1e-6
OPS = ("random_masking", "gather_patches", "unshuffle", "masked_mse", "layer_norm", "add_layer_norm", "bias_gelu")
NATIVE = {"random_masking", "gather_patches", "unshuffle", "masked_mse"} if _library.HAS_CUDA else set()
DEVICE = torch.device("cuda")
Tensors = dict[str, Tensor]


def make(N: int, geometry: tuple[int, int], dtypes: tuple[torch.dtype, ...], D: int = DECODER, channels: int = C) -> Tensors:
    patch, grid = geometry
    (imgs_dtype, x_dtype, token_dtype), L = dtypes, grid * grid
    K, P = L // 4, patch * patch * channels
    shape = (N, channels, patch * grid, patch * grid)
    normal = lambda *size, dtype: torch.randn(size, device=DEVICE, dtype=F32).to(dtype)  # noqa: E731
    imgs = torch.randint(256, shape, dtype=U8, device=DEVICE) if imgs_dtype == U8 else normal(*shape, dtype=imgs_dtype)
    noise = torch.rand(N, L, device=DEVICE)
    ids_keep, ids_restore, mask = ops.random_masking_ref(noise, K)
    return {
        "noise": noise,
        "imgs": imgs,
        "ids_keep": ids_keep,
        "ids_restore": ids_restore,
        "mask": mask,
        "x": normal(N, 1 + K, D, dtype=x_dtype).requires_grad_(),
        "mask_token": normal(1, 1, D, dtype=token_dtype).requires_grad_(),
        "pos_embed": normal(1, 1 + L, D, dtype=token_dtype),
        "dy": normal(N, 1 + L, D, dtype=torch.promote_types(x_dtype, token_dtype)),
        "pred": normal(N, L, P, dtype=x_dtype).requires_grad_(),
        "branch": normal(N, 1 + L, D, dtype=x_dtype).requires_grad_(),
        "residual": normal(N, 1 + L, D, dtype=token_dtype).requires_grad_(),
        "weight": normal(D, dtype=token_dtype).requires_grad_(),
        "bias": normal(D, dtype=token_dtype).requires_grad_(),
        "dbranch": normal(N, 1 + L, D, dtype=x_dtype),
        "hidden": normal(N, 1 + L, 4 * D, dtype=x_dtype).requires_grad_(),
        "hidden_bias": normal(4 * D, dtype=token_dtype).requires_grad_(),
        "dhidden": normal(N, 1 + L, 4 * D, dtype=x_dtype),
        "mean": torch.tensor([0.485, 0.456, 0.406, 0.5][:channels], device=DEVICE),
        "std": torch.tensor([0.229, 0.224, 0.225, 0.2][:channels], device=DEVICE),
    }


def statistics_of(t: Tensors) -> tuple[Tensor | None, Tensor | None]:
    return (t["mean"], t["std"]) if t["imgs"].dtype == U8 else (None, None)


def run_gather(t: Tensors, patch: int, dtype: torch.dtype) -> Tensors:
    return {"patches": ops.gather_patches(t["imgs"], t["ids_keep"], patch, *statistics_of(t), dtype)}


def run_unshuffle(t: Tensors) -> Tensors:
    y = ops.unshuffle(t["x"], t["ids_restore"], t["mask_token"], t["pos_embed"])
    dx, dtoken = torch.autograd.grad(y, (t["x"], t["mask_token"]), t["dy"].to(y.dtype))
    return {"y": y.detach(), "dx": dx, "dmask_token": dtoken}


def run_masked_mse(t: Tensors, patch: int) -> Tensors:
    loss = ops.masked_mse(t["pred"], t["imgs"], t["mask"], patch, True, *statistics_of(t))
    (dpred,) = torch.autograd.grad(loss * 0.37, t["pred"])
    return {"loss": loss.detach(), "dpred": dpred}


def run_block_ops(t: Tensors, dtype: torch.dtype) -> Tensors:
    """What a block does between its products: the norm of the residual, the branch added and the sum normalised, GELU."""
    parameters = (t["weight"], t["bias"])
    normed = ops.layer_norm(t["residual"], *parameters, EPS, dtype)
    added, total = ops.add_layer_norm(t["branch"], t["residual"], *parameters, EPS, dtype)
    gelu = ops.bias_gelu(t["hidden"], t["hidden_bias"])
    results = {"normed": normed, "added": added, "total": total, "gelu": gelu}
    dys = {"normed": t["dbranch"], "added": t["dbranch"], "total": t["dy"], "gelu": t["dhidden"]}
    uses = {"normed": ("residual", "weight", "bias"), "gelu": ("hidden", "hidden_bias")}
    uses["added total"] = ("branch", "residual", "weight", "bias")
    for names, leaves in uses.items():
        outs = names.split()
        grads = [dys[out].to(results[out].dtype) for out in outs]
        for leaf, grad in zip(
            leaves, torch.autograd.grad([results[out] for out in outs], [t[leaf] for leaf in leaves], grads), strict=True
        ):
            results[f"{names} d{leaf}"] = grad
    return {name: value.detach() for name, value in results.items()}


def widened(t: Tensors) -> Tensors:
    """Float64 inputs; uint8 images by the formula (x/255 - mean)/std."""
    keep = ("mask", "noise", "mean", "std")
    wide = {k: v if k in keep or not v.is_floating_point() else v.detach().double() for k, v in t.items()}
    if t["imgs"].dtype == U8:
        pixels = t["imgs"].double() / 255
        wide["imgs"] = (pixels - t["mean"].double()[:, None, None]) / t["std"].double()[:, None, None]
    return {k: v.requires_grad_(t[k].requires_grad) for k, v in wide.items()}


def check(
    name: str, run: Callable[[Tensors], Tensors], exact: Callable[[Tensors], Tensors], cases: list[Tensors], worst: dict
) -> None:
    """By the error rule, all cases as one tensor (of a single number eager may be exact), and the same bits twice."""
    results: dict[str, list[Tensors]] = {"triton": [], "eager": [], "exact": []}
    for t in cases:
        with maefast.backend("triton"):
            got, again = run(t), run(t)
        for key, value in got.items():
            assert torch.equal(value, again[key]), f"{name} {key}: two runs differ"
        results["triton"].append(got)
        with maefast.backend("eager"):
            results["eager"].append(run(t))
            results["exact"].append(exact(widened(t)))
    for key in results["triton"][0]:
        got, eager, truth = (torch.stack([case[key] for case in results[which]]) for which in results)
        assert got.dtype == eager.dtype, f"{name} {key}: {got.dtype}, eager {eager.dtype}"
        assert_close_to_float64(f"{name} {key}", got, eager, truth.double())
        worst[f"{name} {key}"] = (relative_errors(got, truth)[0], relative_errors(eager, truth)[0])


def check_random_masking() -> None:
    for N, L, K in ((64, 196, 49), (3, 256, 64), (5, 1, 0), (2, 1000, 999), (4, 33, 33), (0, 7, 3)):
        noise = torch.rand(N, L, device=DEVICE)
        if N:
            noise[0, : L // 2] = noise[0, L // 2 : L // 2 * 2]
            noise[-1, L // 3] = float("nan")
            noise[-1, 0], noise[-1, L // 2] = -0.0, 0.0
            noise[N // 2] *= -1
        with maefast.backend("triton"):
            got = ops.random_masking(noise, K)
        for mine, reference in zip(got, ops.random_masking_ref(noise, K), strict=True):
            assert torch.equal(mine, reference), f"random_masking {N} x {L}, {K} kept"


def check_case(label: str, cases: list[Tensors], patch: int, dtype: torch.dtype, worst: dict) -> None:
    wide = torch.float64
    check(f"{label} gather", lambda s: run_gather(s, patch, dtype), lambda s: run_gather(s, patch, wide), cases, worst)
    check(f"{label} unshuffle", run_unshuffle, run_unshuffle, cases, worst)
    check(f"{label} mse", lambda s: run_masked_mse(s, patch), lambda s: run_masked_mse(s, patch), cases, worst)
    check(f"{label} block", lambda s: run_block_ops(s, dtype), lambda s: run_block_ops(s, wide), cases, worst)
    M = int(cases[0]["mask"][0].sum())
    compact = [t | {"pred": t["pred"].detach()[:, :M].requires_grad_()} for t in cases]  # rows of a larger tensor
    check(f"{label} compact", lambda s: run_masked_mse(s, patch), lambda s: run_masked_mse(s, patch), compact, worst)


def check_all(report: dict) -> None:
    worst: dict[str, tuple[float, float]] = {}
    check_random_masking()
    for (geometry_name, geometry), (dtype_name, dtypes) in product(GEOMETRIES, DTYPES):
        cases = [make(6, geometry, dtypes) for _ in range(3)]
        check_case(f"{geometry_name} {dtype_name}", cases, geometry[0], dtypes[1], worst)
    for D, channels, geometry in ((63, 1, (5, 3)), (1280, 4, (8, 4)), (768, 3, (2, 6))):
        for dtype_name in ("bf16", "uint8"):
            cases = [make(3, geometry, DTYPES[dtype_name], D, channels) for _ in range(3)]
            for t in cases:
                t["imgs"] = t["imgs"].contiguous(memory_format=torch.channels_last)
            check_case(f"D={D} {dtype_name}", cases, geometry[0], DTYPES[dtype_name][1], worst)
    report["worst_error_over_eager"] = max(mine / max(theirs, 1e-12) for mine, theirs in worst.values())
    report["errors"] = worst


def product(first: dict, second: dict) -> list:
    return [(a, b) for a in first.items() for b in second.items()]


def whole(t: Tensors, patch: int, dtype: torch.dtype) -> Tensors:
    """All ops, forward and backward, in one function."""
    ids_keep, ids_restore, mask = ops.random_masking(t["noise"], t["ids_keep"].shape[1])
    patches = ops.gather_patches(t["imgs"], ids_keep, patch, *statistics_of(t), dtype)
    y = ops.unshuffle(t["x"], ids_restore, t["mask_token"], t["pos_embed"])
    loss = ops.masked_mse(t["pred"], t["imgs"], mask, patch, True, *statistics_of(t))
    normed, total = ops.add_layer_norm(t["branch"], y, t["weight"], t["bias"], EPS, dtype)
    return {"patches": patches, "y": total, "loss": loss, "gelu": ops.bias_gelu(normed, t["bias"])}


def whole_with_gradients(function: Callable, t: Tensors, patch: int, dtype: torch.dtype) -> Tensors:
    out = function(t, patch, dtype)
    leaves = ("x", "mask_token", "pred", "branch", "weight", "bias")
    incoming = (t["dy"].to(out["y"].dtype), None, t["dbranch"].to(out["gelu"].dtype))
    grads = torch.autograd.grad((out["y"], out["loss"], out["gelu"]), [t[leaf] for leaf in leaves], incoming)
    return {k: v.detach().clone() for k, v in (out | dict(zip(leaves, grads, strict=True))).items()}


def check_compiled(report: dict) -> None:
    """Under torch.compile, with a batch that changes, and under CUDA graphs: the same bits as without."""
    for dtype_name, mode in (("amp", None), ("uint8", None), ("bf16", "reduce-overhead")):
        torch._dynamo.reset()
        compiled = torch.compile(whole, fullgraph=True, mode=mode)
        for N in (8, 12, 20) if mode is None else (8, 8, 8):
            t = make(N, GEOMETRIES["B"], DTYPES[dtype_name])
            with maefast.backend("triton"):
                torch.compiler.cudagraph_mark_step_begin()
                got = whole_with_gradients(compiled, t, 16, DTYPES[dtype_name][1])
                plain = whole_with_gradients(whole, t, 16, DTYPES[dtype_name][1])
            for key, value in got.items():
                assert torch.equal(value, plain[key]), f"compiled {dtype_name} {mode} N={N} {key} differs"
    t = make(8, GEOMETRIES["B"], DTYPES["bf16"])
    with maefast.backend("triton"):
        plain = whole_with_gradients(whole, t, 16, BF16)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = whole_with_gradients(whole, t, 16, BF16)
    graph.replay()
    torch.cuda.synchronize()
    for key, value in captured.items():
        assert torch.equal(value, plain[key]), f"CUDA graph: {key} differs"
    report["compiled"] = "fullgraph, changing batch, reduce-overhead and CUDA graph agree bit for bit"


def medians(runs: dict, timer: CudaTimer, sets: int, rounds: int = 15) -> dict[str, float]:
    """Microseconds of each contender."""
    samples = rotate(runs, timer, Budget(seconds=0, least=rounds, most=rounds), sets)
    return {name: statistics.median(values) * 1e6 for name, values in samples.items()}


def copy_bandwidth(timer: CudaTimer) -> float:
    source, target = (torch.randn(1 << 28, device=DEVICE) for _ in range(2))
    return 2 * source.nbytes / medians({"copy": lambda i: target.copy_(source)}, timer, 1)["copy"] / 1e3  # GB/s


def bytes_of(op: str, t: Tensors, out_size: int) -> int:
    N, L = t["noise"].shape
    K, D, P = t["x"].shape[1] - 1, t["x"].shape[2], t["pred"].shape[2]
    x, dy, token = t["x"].element_size(), t["dy"].element_size(), t["mask_token"].element_size()
    imgs, pred = t["imgs"].element_size(), t["pred"].element_size()
    seen = N * L * 4 + N * (L - K) * P * (pred + imgs)
    block = N * (1 + L) * D
    unshuffle_fwd = N * (1 + K) * D * x + N * L * 8 + (2 + L) * D * token + N * (1 + L) * D * dy
    unshuffle_bwd = N * (1 + L) * D * dy + N * L * 8 + N * (1 + K) * D * x + D * token
    return {
        "random_masking": N * L * 16 + N * K * 8,
        "gather_patches": N * K * (8 + P * (imgs + out_size)),
        "unshuffle fwd": unshuffle_fwd,
        "unshuffle fwd+bwd": unshuffle_fwd + unshuffle_bwd,
        "masked_mse fwd": seen,
        "masked_mse fwd+bwd": 2 * seen + N * L * P * pred,
        "layer_norm fwd": block * (token + x),
        "layer_norm fwd+bwd": block * (token + x) + block * (x + 2 * token),
        "add_layer_norm fwd": block * 2 * (x + token),
        "add_layer_norm fwd+bwd": block * 2 * (x + token) + block * (x + 3 * token + (x if x != token else 0)),
        "bias_gelu fwd": 4 * block * 2 * x,
        "bias_gelu fwd+bwd": 4 * block * 5 * x,
    }[op]


def contenders(op: str, patch: int, dtype: torch.dtype) -> tuple[Callable, Callable]:
    """(reference, public op), each a function of the inputs that returns what is differentiated."""
    if op == "random_masking":
        return ops.random_masking_ref, ops.random_masking
    if op == "gather_patches":
        return (
            lambda imgs, ids, mean, std: ops.gather_patches_ref(imgs, ids, (patch, patch), mean, std, dtype),
            lambda imgs, ids, mean, std: ops.gather_patches(imgs, ids, patch, mean, std, dtype),
        )
    if op == "unshuffle":
        return ops.unshuffle_ref, ops.unshuffle
    if op == "layer_norm":
        return (
            lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias, EPS).to(dtype),
            lambda x, weight, bias: ops.layer_norm(x, weight, bias, EPS, dtype),
        )
    if op == "add_layer_norm":

        def plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            total = x + residual
            return F.layer_norm(total, weight.shape, weight, bias, EPS).to(dtype), total

        return plain, lambda x, residual, weight, bias: ops.add_layer_norm(x, residual, weight, bias, EPS, dtype)
    if op == "bias_gelu":
        return lambda x, bias: F.gelu(x + bias.to(x.dtype)), ops.bias_gelu
    return (
        lambda pred, imgs, mask, mean, std: ops.masked_mse_ref(pred, imgs, mask, (patch, patch), True, mean, std),
        lambda pred, imgs, mask, mean, std: ops.masked_mse(pred, imgs, mask, patch, True, mean, std),
    )


def arguments(op: str, t: Tensors) -> tuple[Any, ...]:
    return {
        "random_masking": lambda: (t["noise"], t["ids_keep"].shape[1]),
        "gather_patches": lambda: (t["imgs"], t["ids_keep"], *statistics_of(t)),
        "unshuffle": lambda: (t["x"], t["ids_restore"], t["mask_token"], t["pos_embed"]),
        "masked_mse": lambda: (t["pred"], t["imgs"], t["mask"], *statistics_of(t)),
        "layer_norm": lambda: (t["residual"], t["weight"], t["bias"]),
        "add_layer_norm": lambda: (t["branch"], t["residual"], t["weight"], t["bias"]),
        "bias_gelu": lambda: (t["hidden"], t["hidden_bias"]),
    }[op]()


def runs_of(op: str, sets: list[Tensors], function: Callable, backend: str) -> dict[str, Callable[[int], Any]]:
    """Forward, and forward + backward where there is one."""

    def forward(i: int) -> Any:
        with maefast.backend(backend):
            return function(*arguments(op, sets[i]))

    if op in ("random_masking", "gather_patches"):
        return {op: forward}
    leaves, incoming = {
        "unshuffle": (("x", "mask_token"), ("dy",)),
        "masked_mse": (("pred",), (None,)),
        "layer_norm": (("residual", "weight", "bias"), ("dbranch",)),
        "add_layer_norm": (("branch", "residual", "weight", "bias"), ("dbranch", "dy")),
        "bias_gelu": (("hidden", "hidden_bias"), ("dhidden",)),
    }[op]

    def both(i: int) -> Any:
        t = sets[i]
        dys = [None if name is None else t[name] for name in incoming]
        return torch.autograd.grad(forward(i), [t[leaf] for leaf in leaves], dys)

    return {f"{op} fwd": forward, f"{op} fwd+bwd": both}


def measure(report: dict, timer: CudaTimer, deadline: float) -> None:
    copy = report["copy_gb_per_s"]
    plan = [("B", d, N) for N in (256, 1024, 64) for d in ("amp", "fp32", "bf16", "uint8")] + [
        ("H", "amp", 256),
        ("H", "fp32", 256),
    ]
    for geometry, dtype_name, N in plan:
        patch, dtypes = GEOMETRIES[geometry][0], DTYPES[dtype_name]
        sets = [make(N, GEOMETRIES[geometry], dtypes) for _ in range(2)]
        for op in OPS:
            if op == "random_masking" and dtype_name != "amp":
                continue
            plain, fused = contenders(op, patch, dtypes[1])
            groups: dict[str, dict[str, Callable]] = {}
            functions = {"eager": (plain, "eager"), "triton": (fused, "triton")}
            if op in NATIVE:
                functions["native"] = (fused, "native")
            if geometry == "B" and dtype_name in ("amp", "fp32") and time.monotonic() < deadline:
                torch._dynamo.reset()
                functions["compiled"] = (torch.compile(plain, fullgraph=True, dynamic=False), "eager")
            for contender, (function, backend) in functions.items():
                for name, run in runs_of(op, sets, function, backend).items():
                    groups.setdefault(name, {})[contender] = run
            for name, runs in groups.items():
                us = medians(runs, timer, len(sets), 9 if N == 1024 else 15)
                size = bytes_of(name, sets[0], torch.empty(0, dtype=dtypes[1]).element_size())
                gb_per_s = size / us["triton"] / 1e3
                row = {"op": name, "model": geometry, "dtype": dtype_name, "N": N, "us": us, "bytes": size, "gb_per_s": gb_per_s}
                report["rows"].append(row | {"copy_fraction": gb_per_s / copy})
        del sets, groups, functions, runs, run
        torch.cuda.empty_cache()


def host_overhead(report: dict) -> None:
    """Microseconds of Python and launching per call, small batch."""
    t = make(2, GEOMETRIES["B"], DTYPES["amp"])
    for op in OPS:
        plain, fused = contenders(op, 16, BF16)
        functions = {"eager": plain, "triton": fused} | ({"native": fused} if op in NATIVE else {})
        for backend, function in functions.items():
            for name, run in runs_of(op, [t], function, backend).items():
                for _ in range(20):
                    run(0)
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(200):
                    run(0)
                report["host_us"].setdefault(name, {})[backend] = (time.perf_counter() - start) / 200 * 1e6
                torch.cuda.synchronize()


def print_table(report: dict) -> None:
    print(f"{report['device']}, torch {report['torch']}, triton {report['triton']}, copy {report['copy_gb_per_s']:.0f} GB/s")
    for stage, state in report["stages"].items():
        print(f"{stage}: {state}")
    print(f"worst error over eager's {report.get('worst_error_over_eager', float('nan')):.2f}; {report.get('compiled', '')}")
    host = (f"{name} {'/'.join(f'{value:.0f}' for value in us.values())}" for name, us in report["host_us"].items())
    print(f"host us per call, eager/triton/native: {', '.join(host)}")
    heading = ("op", "", "dtype", "N", "eager", "comp.", "native", "triton", "x eager", "GB/s", "copy")
    print("{:19s} {:1s} {:5s} {:>4s} {:>7s} {:>7s} {:>7s} {:>7s} {:>7s} {:>5s} {:>5s}".format(*heading))
    for row in report["rows"]:
        us = row["us"]
        others = " ".join(f"{us[name]:7.1f}" if name in us else f"{'-':>7s}" for name in ("compiled", "native"))
        print(
            f"{row['op']:19s} {row['model']} {row['dtype']:5s} {row['N']:4d} {us['eager']:7.0f} {others} {us['triton']:7.1f} "
            f"{us['eager'] / us['triton']:7.1f} {row['gb_per_s']:5.0f} {row['copy_fraction']:5.0%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=100, help="torch compiles no more after this")
    options = parser.parse_args()
    import triton

    start = time.monotonic()
    torch.manual_seed(0)
    timer = CudaTimer(torch.device("cuda"))
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    report |= {"copy_gb_per_s": copy_bandwidth(timer), "rows": [], "host_us": {}, "stages": {}}
    stages: dict[str, Callable[[], None]] = {
        "check": lambda: check_all(report),
        "measure": lambda: measure(report, timer, start + options.seconds),
        "compiled": lambda: check_compiled(report),
        "host": lambda: host_overhead(report),
    }
    out = Path(os.environ.get("OUT", ROOT / "build" / "gpu"))
    out.mkdir(parents=True, exist_ok=True)
    for name, stage in stages.items():
        begin = time.monotonic()
        torch.use_deterministic_algorithms(name == "check", warn_only=True)  # and so torch.empty is filled with NaN
        try:
            stage()
            report["stages"][name] = f"ok, {time.monotonic() - begin:.0f} s"
        except Exception as error:
            traceback.print_exc()
            report["stages"][name] = f"FAILED: {type(error).__name__}: {str(error)[:300]}"
        (out / "ops.json").write_text(json.dumps(report, indent=1))
    print_table(report)
    sys.exit(any(state.startswith("FAILED") for state in report["stages"].values()))


if __name__ == "__main__":
    main()
