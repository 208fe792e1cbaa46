"""Which implementation of an op runs: the fastest that can, or the one that was asked for.

`auto` walks BACKENDS from the fastest to the plainest and takes the first whose `can_run` gives no reason against it. A request,
by the environment variable MAEFAST_BACKEND (read at import) or by `backend(...)`, never falls back: it raises with the reason. It
binds every op of which that backend has a kernel on any device; the others choose by themselves.
A new backend is one entry in BACKENDS and one function of reasons in _REASONS.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _library, kernels

Inputs = Mapping[str, Tensor]

OPS = (
    "random_masking",
    "gather_patches",
    "unshuffle",
    "masked_mse",
    "layer_norm",
    "add_layer_norm",
    "bias_gelu",
    "attention",
    "linear",
)
BACKENDS = ("native", "triton", "eager")  # fastest first

_F32, _BF16, _F16, _U8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8
_FLOATS = (_F32, _BF16, _F16)
# What the kernels of an op take, on every backend that has one.
_DTYPES: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    "random_masking": {"noise": (_F32,)},
    "gather_patches": {"imgs": (*_FLOATS, _U8), "out": _FLOATS},
    "unshuffle": {"x": _FLOATS, "mask_token": _FLOATS, "pos_embed": _FLOATS},
    "masked_mse": {"pred": _FLOATS, "imgs": (*_FLOATS, _U8)},
    "layer_norm": dict.fromkeys(("x", "weight", "bias", "out"), _FLOATS),
    "add_layer_norm": dict.fromkeys(("x", "residual", "weight", "bias", "out"), _FLOATS),
    "bias_gelu": dict.fromkeys(("x", "bias"), _FLOATS),
    "attention": dict.fromkeys(("qkv", "q"), _FLOATS),
    "linear": dict.fromkeys(("x", "weight", "bias", "out"), _FLOATS),
}
_TRITON_OPS = _DTYPES.keys() - {"attention", "linear"}
_MAX_HEAD_WIDTH = 128  # of native attention on the CPU
_CUDA_OPS = {"random_masking", "gather_patches", "unshuffle", "masked_mse", "attention"}  # that are native on a GPU, too
_CUDA_RANKED = 2048  # patches that native random_masking ranks by counting on a GPU
_CUDA_VALUES = 12272  # of a patch that native masked_mse holds in shared memory on a GPU
_CUDA_TOKENS = {32: 288, 64: 208, 80: 80}  # per head width, what native attention holds on a GPU
_GPU_CAPABILITY = (8, 0)  # Ampere
_TRITON_COUNTED = 1024  # patches that random_masking ranks by counting; a sort is faster for more
_TRITON_VALUES = 4096  # of a patch, channels and pixels rounded up to powers of two, that masked_mse holds in registers
_TRITON_WIDTH = 8192  # of a row that the norms hold in registers
_CPUINFO = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
_ON_INTEL = "GenuineIntel" in _CPUINFO
_HAS_AVX512 = "avx512f" in _CPUINFO
_MULTIPLIES_BF16 = "avx512_bf16" in _CPUINFO


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _why_not_taken(backend: str, op: str, name: str, tensor: Tensor) -> str | None:
    """A reason that every kernel of `op` has against one of its inputs."""
    dtypes = _DTYPES[op].get(name)
    if dtypes is not None and tensor.dtype not in dtypes:
        return f"{backend} {op} takes {_names(dtypes)}, {name} is {_names((tensor.dtype,))}"
    if name == "imgs" and tensor.requires_grad and torch.is_grad_enabled():
        return f"{backend} {op} has no gradient for imgs"
    return None


def _why_not_native(op: str, inputs: Inputs, head_width: int) -> str | None:
    if not _library.HAS_NATIVE:
        return "maefast was installed without its native library (MAEFAST_NATIVE=0)"
    for name, tensor in inputs.items():
        if tensor.device.type == "cuda":
            return _why_not_cuda(op, inputs, head_width)
        if tensor.device.type != "cpu":
            return f"the native kernels run on the CPU and on CUDA, {name} is on {tensor.device}"
        if (reason := _why_not_taken("native", op, name, tensor)) is not None:
            return reason
    if op == "attention" and head_width > _MAX_HEAD_WIDTH:
        return f"native attention takes heads of up to {_MAX_HEAD_WIDTH}, they are {head_width} wide"
    return None


def _why_not_cuda(op: str, inputs: Inputs, head_width: int) -> str | None:
    if not _library.HAS_CUDA:
        return "maefast was built without CUDA kernels"
    if op not in _CUDA_OPS:
        return f"there is no native kernel of {op} for GPUs"
    for name, tensor in inputs.items():
        if (capability := _capability(tensor.device)) < _GPU_CAPABILITY:
            return f"native {op} needs compute capability 8.0, {name} is on a GPU of {capability[0]}.{capability[1]}"
        if (reason := _why_not_taken("native", op, name, tensor)) is not None:
            return reason
    if op == "attention":
        return _why_not_cuda_attention(inputs, head_width)
    if "noise" in inputs and inputs["noise"].dim() == 2 and inputs["noise"].shape[1] > _CUDA_RANKED:
        return f"native {op} on a GPU ranks up to {_CUDA_RANKED} patches, noise has {inputs['noise'].shape[1]}"
    if "pred" in inputs and inputs["pred"].dim() == 3 and inputs["pred"].shape[2] > _CUDA_VALUES:
        return f"native {op} on a GPU holds patches of up to {_CUDA_VALUES} values, pred has {inputs['pred'].shape[2]}"
    if op == "unshuffle":
        x, mask_token, pos_embed = (inputs[name].dtype for name in ("x", "mask_token", "pos_embed"))
        if mask_token != pos_embed or mask_token not in (x, _F32):
            dtypes = f"they are {_names((mask_token, pos_embed))} beside {_names((x,))}"
            return f"native {op} on a GPU takes mask_token and pos_embed of one dtype, float32 or x's; {dtypes}"
    return None


def _why_not_cuda_attention(inputs: Inputs, head_width: int) -> str | None:
    if "q" in inputs:
        return "native attention on a GPU takes packed queries alone"
    qkv = inputs["qkv"]
    if qkv.dtype not in (_BF16, _F16):
        return f"native attention on a GPU takes {_names((_BF16, _F16))}, qkv is {_names((qkv.dtype,))}"
    most = _CUDA_TOKENS.get(head_width)
    if most is None:
        return f"native attention on a GPU takes heads {', '.join(map(str, _CUDA_TOKENS))} wide, they are {head_width} wide"
    if qkv.shape[1] > most:
        return f"native attention on a GPU takes up to {most} tokens of heads {head_width} wide, qkv has {qkv.shape[1]}"
    return None


def _why_not_triton(op: str, inputs: Inputs, head_width: int) -> str | None:
    if not kernels.HAS_TRITON:
        return "Triton is not installed"
    if op not in _TRITON_OPS:
        return f"there is no Triton kernel of {op}"
    for name, tensor in inputs.items():
        if tensor.device.type != "cuda" and not kernels.INTERPRETED:
            return f"the Triton kernels run on a GPU, {name} is on {tensor.device}"
        if tensor.device.type == "cuda" and (capability := _capability(tensor.device)) < _GPU_CAPABILITY:
            return f"the Triton kernels need compute capability 8.0, {name} is on a GPU of {capability[0]}.{capability[1]}"
        if (reason := _why_not_taken("triton", op, name, tensor)) is not None:
            return reason
        if name == "noise" and tensor.dim() == 2 and tensor.shape[1] > _TRITON_COUNTED:
            return f"triton random_masking ranks up to {_TRITON_COUNTED} patches, noise has {tensor.shape[1]}"
        if name == "pred" and tensor.dim() == 3 and (reason := _too_large(tensor.shape[2], inputs["imgs"].shape[1])) is not None:
            return reason
        if name == "x" and op in ("layer_norm", "add_layer_norm") and tensor.shape[-1] > _TRITON_WIDTH:
            return f"triton {op} takes rows of up to {_TRITON_WIDTH} values, x has {tensor.shape[-1]}"
    return None


def _too_large(values: int, channels: int) -> str | None:
    padded_channels, padded_pixels = 1, 1
    while padded_channels < channels:
        padded_channels *= 2
    while padded_pixels * channels < values:
        padded_pixels *= 2
    if padded_channels * padded_pixels <= _TRITON_VALUES:
        return None
    return f"triton masked_mse holds patches of up to {_TRITON_VALUES} values, padded; pred has {values} in {channels} channels"


def _capability(device: torch.device) -> tuple[int, int]:
    if torch.compiler.is_compiling() or not torch.cuda.is_available():  # compiled code needs Triton anyway; a fake tensor
        return _GPU_CAPABILITY
    return torch.cuda.get_device_capability(device)


def _why_not_eager(op: str, inputs: Inputs, head_width: int) -> str | None:
    return None


def _why_not_worth_it(op: str, backend: str, inputs: Inputs) -> str | None:
    """A reason for `auto` to leave a backend alone though it can run (figures: benchmarks/results)."""
    if op == "attention" and backend == "native" and inputs["qkv"].device.type == "cuda":
        return "its tests have not run on a GPU yet"
    on_gpu = any(tensor.device.type == "cuda" for tensor in inputs.values())
    if backend == "native" and on_gpu and op in _TRITON_OPS and kernels.HAS_TRITON:
        return f"no measurement shows that native {op} is faster than triton's on a GPU"
    if backend == "triton" and op in ("layer_norm", "add_layer_norm", "bias_gelu"):
        return f"no measurement shows that triton {op} is faster"
    if op != "linear" or backend != "native":
        return None
    if _ON_INTEL:
        return "torch's own products, MKL's and oneDNN's, are at home on Intel"
    dtype = inputs["out"].dtype
    if (dtype == _F32 and _HAS_AVX512) or (dtype == _BF16 and _MULTIPLIES_BF16):
        return None
    return f"torch's own product is as fast in {_names((dtype,))} on this CPU"


_REASONS: dict[str, Callable[[str, Inputs, int], str | None]] = {
    "native": _why_not_native,
    "triton": _why_not_triton,
    "eager": _why_not_eager,
}


def can_run(op: str, backend: str, inputs: Inputs, head_width: int = 0) -> str | None:
    """None where `backend` can run `op` on `inputs` (argument name -> tensor), else the reason, in one sentence."""
    return _REASONS[backend](op, inputs, head_width)


_NOT_INSTALLED: dict[str, str] = {
    name: reason for name in ("native", "triton") if (reason := can_run(OPS[0], name, {})) is not None
}


def _checked(name: str, source: str) -> str | None:
    if name == "auto":
        return None
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of auto, {', '.join(BACKENDS)}; it is {name!r}")
    if (reason := _NOT_INSTALLED.get(name)) is not None:
        raise RuntimeError(f"{source} asks for {name}: {reason}")
    return name


_requested: str | None = _checked(os.environ.get("MAEFAST_BACKEND", "auto"), "MAEFAST_BACKEND")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the block every op of the process runs on `name` ("auto" lets maefast choose again); compiled code notices.

    Raises ValueError for an unknown name and RuntimeError where this installation has no such backend; an op that cannot run on
    it raises RuntimeError with the reason.
    """
    global _requested
    before, _requested = _requested, _checked(name, "backend")
    try:
        yield
    finally:
        _requested = before


def _request_for(op: str) -> str | None:
    """The request that binds `op`: a backend that has no kernel of it on any device does not, and `op` chooses by itself."""
    return _requested if _requested != "triton" or op in _TRITON_OPS else None


def is_requested(op: str) -> bool:
    """Whether the backend of `op` was asked for, and so binds all of it."""
    return _request_for(op) is not None


def choose(op: str, inputs: Inputs, head_width: int = 0) -> str:
    """The backend that runs `op` on `inputs`."""
    if (requested := _request_for(op)) is not None:
        reason = can_run(op, requested, inputs, head_width)
        if reason is not None:
            raise RuntimeError(f"maefast.ops.{op} cannot run on the requested backend {requested!r}: {reason}")
        return requested
    for name in BACKENDS:
        if can_run(op, name, inputs, head_width) is None and _why_not_worth_it(op, name, inputs) is None:
            return name
    raise AssertionError("eager runs everything")


def ops_of(backend: str) -> Any:
    """The namespace of torch.ops that holds the kernels of `backend`, `<op>_fwd` and `<op>_bwd`; eager has none."""
    return torch.ops.maefast_triton if backend == "triton" else torch.ops.maefast


def is_autocast(x: Tensor) -> bool:
    """Whether autocast has a say in matrix products of `x`; as in torch it leaves float64 alone."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products of `x` run in: autocast's where it is on, else its own."""
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x) else x.dtype


def explain(model: torch.nn.Module | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """Prints a table: op, the backend chosen for tensors of `device` and `dtype`, why the others were not.

    With a `maefast.MAE`, also the methods that are overridden, and so the route that its forward takes.
    """
    rows = [("op", "backend", "why not the others")]
    for op in OPS:
        inputs, width = _example(op, dtype, device)
        requested = _request_for(op)
        chosen = requested or choose(op, inputs, width)
        reason = can_run(op, chosen, inputs, width)
        why = [f"{chosen} was requested and cannot run: {reason}"] if reason else []
        for name in BACKENDS:
            if name != chosen:
                asked = " was requested and does not bind this op" if name == _requested else ""
                why.append(f"{name}{asked}: {can_run(op, name, inputs, width) or _not_taken(chosen, op, name, inputs)}")
        rows.append((op, chosen, "; ".join(why)))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for row in rows:
        print(f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}")
    if model is not None:
        overridden: tuple[str, ...] = getattr(model, "overridden_methods", tuple)()
        route = f"the official route, through the overridden {', '.join(overridden)}" if overridden else "the fused path"
        print(f"{type(model).__name__}.forward takes {route}")


def _example(op: str, dtype: torch.dtype, device: str) -> tuple[Inputs, int]:
    """Inputs of an op for explain(), and the width of a head; attention's are those of ViT-B/16's encoder."""
    if op == "random_masking":
        return {"noise": torch.empty(0, device=device)}, 0
    if op == "attention":
        return {"qkv": torch.empty(0, 50, 3 * 768, dtype=dtype, device=device)}, 64
    return {name: torch.empty(0, dtype=dtype, device=device) for name in _DTYPES[op]}, 0


def _not_taken(chosen: str, op: str, name: str, inputs: Inputs) -> str:
    if _request_for(op) is not None:
        return f"{chosen} was requested"
    return _why_not_worth_it(op, name, inputs) or f"{chosen} is faster"


if not _library.HAS_NATIVE:
    warnings.warn("maefast runs without its native kernels: everything works, slower", UserWarning, stacklevel=2)
