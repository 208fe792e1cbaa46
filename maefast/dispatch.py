"""Which implementation of an op runs: the fastest that can, or the one that was asked for.

`auto` walks BACKENDS from the fastest to the plainest and takes the first whose `can_run` gives no reason against it. A request,
by the environment variable MAEFAST_BACKEND (read at import) or by `backend(...)`, never falls back: it raises with the reason. It
binds every op of which that backend has a kernel on any device; the others choose by themselves. What a model's `attn_backend`
asks for holds where no such request binds attention.
A new backend is one entry in BACKENDS, the ops that it binds in _BOUND, and one function of reasons in _REASONS.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import _apex, _flash_attn, _library, _torch, cpu, kernels, tuned
from .gpu import capability as _capability
from .gpu import shared_memory as _shared_memory

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
BACKENDS = ("native", "triton", "apex", "flash_attn", "sdpa", "eager")  # fastest first
ATTENTION_BACKENDS = ("native", "flash_attn", "sdpa", "eager")  # that a model may ask for

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
# The ops that a request binds, where not all.
_BOUND = {"triton": _TRITON_OPS, "apex": {"layer_norm"}, "flash_attn": {"attention"}, "sdpa": {"attention"}}
_MAX_HEAD_WIDTH = 128  # of native attention on the CPU
_CUDA_OPS = {"random_masking", "gather_patches", "unshuffle", "masked_mse", "attention"}  # that are native on a GPU, too
_CUDA_RANKED = 2048  # patches that native random_masking ranks by counting on a GPU
_CUDA_VALUES = 12272  # of a patch that native masked_mse holds in shared memory on a GPU
# Per head width, what native attention holds on a GPU.
_CUDA_TOKENS = {width: tiles[-1].last for width, tiles in tuned.NATIVE_ATTENTION.items()}
_GPU_CAPABILITY = (8, 0)  # Ampere
_TRITON_COUNTED = 1024  # patches that random_masking ranks by counting; a sort is faster for more
_TRITON_VALUES = 4096  # of a patch, channels and pixels rounded up to powers of two, that masked_mse holds in registers
_TRITON_WIDTH = 8192  # of a row that the norms hold in registers
_NO_APEX = _apex.why_not("normalization", "fused_layer_norm_cuda")
_ON_INTEL, _HAS_AVX512, _MULTIPLIES_BF16 = cpu.IS_INTEL, cpu.has_avx512(), cpu.multiplies_bf16()


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
        return cpu.NO_NATIVE
    for name, tensor in inputs.items():
        if tensor.device.type == "cuda":
            return _why_not_cuda(op, inputs, head_width) or _why_not_shared(op, inputs, head_width)
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


def _why_not_shared(op: str, inputs: Inputs, head_width: int) -> str | None:
    """A reason against a kernel that the GPU is large enough for in every other respect."""
    if op != "attention" or (tile := tuned.native_tile(head_width, inputs["qkv"].shape[1])) is None:
        return None
    if (available := _shared_memory(inputs["qkv"].device)) >= tile.shared_memory:
        return None
    tokens, needed = inputs["qkv"].shape[1], tile.shared_memory >> 10
    return (
        f"native attention of {tokens} tokens, heads {head_width} wide, needs {needed} KB of shared memory, "
        f"the GPU has {available >> 10}"
    )


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


def _why_not_flash_attn(op: str, inputs: Inputs, head_width: int) -> str | None:
    if op != "attention":
        return f"there is no {op} in flash-attn"
    tensors = {name: inputs[name] for name in ("qkv", "q") if name in inputs}
    return _flash_attn.why_not(tensors, head_width, _capability)


def _why_not_sdpa(op: str, inputs: Inputs, head_width: int) -> str | None:
    return None if op == "attention" else f"SDPA is attention, not {op}"


def _why_not_apex(op: str, inputs: Inputs, head_width: int) -> str | None:
    if op not in _BOUND["apex"]:
        return f"there is no {op} in apex"
    if _NO_APEX is not None:
        return _NO_APEX
    for name, tensor in inputs.items():
        if tensor.device.type != "cuda":
            return f"apex runs on a GPU, {name} is on {tensor.device}"
        if (reason := _why_not_taken("apex", op, name, tensor)) is not None:
            return reason
        if name != "out" and tensor.dtype != inputs["x"].dtype:
            return f"apex {op} takes tensors of one dtype, x is {_names((inputs['x'].dtype,))}, {name} {_names((tensor.dtype,))}"
    return None


def _why_not_eager(op: str, inputs: Inputs, head_width: int) -> str | None:
    return None


def _why_not_worth_it(op: str, backend: str, inputs: Inputs, head_width: int) -> str | None:
    """A reason for `auto` to leave a backend alone though it can run (figures: benchmarks/results)."""
    if op == "attention" and inputs["qkv"].device.type == "cuda":
        return _why_not_fastest(backend, inputs, head_width)
    if backend == "native" and _on_gpu(inputs) and op in _TRITON_OPS and kernels.HAS_TRITON:
        return f"no measurement shows that native {op} is faster than triton's on a GPU"
    if backend == "triton" and op in ("layer_norm", "add_layer_norm", "bias_gelu"):
        return f"no measurement shows that triton {op} is faster"
    if backend == "apex":
        return f"no measurement shows that apex {op} is faster"
    if op != "linear" or backend != "native":
        return None
    if _ON_INTEL:
        return "torch's own products, MKL's and oneDNN's, are at home on Intel"
    dtype = inputs["out"].dtype
    if (dtype == _F32 and _HAS_AVX512) or (dtype == _BF16 and _MULTIPLIES_BF16):
        return None
    return f"torch's own product is as fast in {_names((dtype,))} on this CPU"


def _why_not_fastest(backend: str, inputs: Inputs, head_width: int) -> str | None:
    """What tuned.json has against attention on a GPU by anything but SDPA. Queries of their own have not been measured."""
    capability, tokens = _capability(inputs["qkv"].device), inputs["qkv"].shape[1]
    if backend == tuned.DEFAULT_ATTENTION:
        return None
    if "q" not in inputs and backend == tuned.fastest_attention(capability, head_width, tokens):
        return None
    where = f"{tokens} tokens, heads {head_width} wide, on sm_{capability[0]}{capability[1]}"
    return f"no measurement shows that it is faster than SDPA for {where}"


_REASONS: dict[str, Callable[[str, Inputs, int], str | None]] = {
    "native": _why_not_native,
    "triton": _why_not_triton,
    "apex": _why_not_apex,
    "flash_attn": _why_not_flash_attn,
    "sdpa": _why_not_sdpa,
    "eager": _why_not_eager,
}


def can_run(op: str, backend: str, inputs: Inputs, head_width: int = 0) -> str | None:
    """None where `backend` can run `op` on `inputs` (argument name -> tensor), else the reason, in one sentence."""
    return _REASONS[backend](op, inputs, head_width)


_NOT_INSTALLED: dict[str, str] = {
    name: reason
    for name, op in (("native", OPS[0]), ("triton", OPS[0]), ("apex", "layer_norm"), ("flash_attn", "attention"))
    if (reason := can_run(op, name, {})) is not None
}


def _checked(name: str, source: str, names: tuple[str, ...] = BACKENDS) -> str | None:
    if name == "auto":
        return None
    if name not in names:
        raise ValueError(f"{source} must be one of auto, {', '.join(names)}; it is {name!r}")
    if (reason := _NOT_INSTALLED.get(name)) is not None:
        raise RuntimeError(f"{source} asks for {name}: {reason}")
    return name


def check_attention_backend(name: str, source: str) -> None:
    """Raises ValueError unless `name` is "auto" or in ATTENTION_BACKENDS, RuntimeError where the installation lacks it."""
    _checked(name, source, ATTENTION_BACKENDS)


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


def requested() -> str | None:
    """The backend that was asked for, for the whole process."""
    return _requested


def binds(name: str, op: str, inputs: Inputs) -> bool:
    """Whether a request for the backend `name` binds `op`: whether it has a kernel of it on any device; `native`, which is two
    sets of kernels, on the device of `inputs`."""
    if name == "native" and _on_gpu(inputs) and _library.HAS_CUDA:
        return op in _CUDA_OPS
    return op in _BOUND.get(name, OPS)


def request_for(op: str, inputs: Inputs, asked: str = "auto") -> str | None:
    """The backend that `op` must run on: that of a request for the whole process where it binds `op`, else the one that the
    caller asked for, else None: `op` chooses by itself."""
    if _requested is not None and binds(_requested, op, inputs):
        return _requested
    return None if asked == "auto" else asked


def _on_gpu(inputs: Inputs) -> bool:
    return any(tensor.device.type == "cuda" for tensor in inputs.values())


def choose(op: str, inputs: Inputs, head_width: int = 0, asked: str = "auto") -> str:
    """The backend that runs `op` on `inputs`; `asked`: by the caller, as request_for takes it."""
    if (requested := request_for(op, inputs, asked)) is not None:
        reason = can_run(op, requested, inputs, head_width)
        if reason is not None:
            raise RuntimeError(f"maefast.ops.{op} cannot run on the requested backend {requested!r}: {reason}")
        return requested
    for name in BACKENDS:
        if _why_not_worth_it(op, name, inputs, head_width) is None and can_run(op, name, inputs, head_width) is None:
            return name
    raise AssertionError("eager runs everything")


def ops_of(backend: str) -> Any:
    """The namespace of torch.ops that holds the kernels of `backend`, `<op>_fwd` and `<op>_bwd`; eager has none."""
    return torch.ops.maefast_triton if backend == "triton" else torch.ops.maefast


def inputs_of(op: str) -> tuple[str, ...]:
    """The names of the tensors that the choice of a backend looks at."""
    return tuple(_DTYPES[op])


def is_autocast(x: Tensor) -> bool:
    """Whether autocast has a say in matrix products of `x`; as in torch it leaves float64 alone."""
    device = x.device.type
    return device in _torch.AUTOCAST_DEVICES and torch.is_autocast_enabled(device) and x.dtype != torch.float64


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products of `x` run in: autocast's where it is on, else its own."""
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x) else x.dtype


def why_not_chosen(op: str, name: str, chosen: str, inputs: Inputs, head_width: int = 0, asked: str = "auto") -> str:
    """Why `name` was passed over for the backend that `choose` gives."""
    if (reason := can_run(op, name, inputs, head_width)) is not None:
        return reason
    if request_for(op, inputs, asked) is not None:
        return f"{chosen} was requested"
    if (name, chosen) == ("eager", "sdpa"):
        return "the same call"
    return _why_not_worth_it(op, name, inputs, head_width) or f"{chosen} is faster"


if not _library.HAS_NATIVE:
    warnings.warn("maefast runs without its native kernels: everything works, slower", UserWarning, stacklevel=2)
