"""The flash-attn package (https://github.com/Dao-AILab/flash-attention) as a backend of attention:
release 2, whose functions torch.compile traces, or 4, whose kernels become ops of torch here."""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_CUTE = "flash_attn.cute.interface"
_DTYPES = (torch.bfloat16, torch.float16)
_MAX_HEAD_WIDTH = 256
_HEAD_WIDTH_ON_BLACKWELL = 128  # of release 4, which otherwise takes 256 alone there
_ALIGNMENT = 16  # bytes, of every row that a kernel reads
_DEVICE = "cuda"


def _installed() -> int | None:
    """Return the installed release, or None; release 2 may hold the sources of 4."""
    spec = importlib.util.find_spec("flash_attn")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec is not None else []
    for release, file in ((2, "flash_attn_interface.py"), (4, "cute/interface.py")):
        if any((folder / file).exists() for folder in folders):
            return release
    return None


RELEASE = _installed()


def _why_not_loaded() -> str | None:
    """A build for another torch or a missing dependency shows when it is imported."""
    try:
        importlib.import_module("flash_attn" if RELEASE == 2 else _CUTE)
    except ImportError as error:
        return f"flash-attn does not load beside torch {torch.__version__}: {error}"
    return None


# else the decorator, which imports the whole of torch.compile, would delay every import of maefast
if RELEASE is not None:
    _why_not_loaded = torch.compiler.assume_constant_result(_why_not_loaded)


def why_not(
    device: torch.device, dtype: torch.dtype, head_width: int, capability_of: Callable[[torch.device], tuple[int, int]]
) -> str | None:
    """Return the reason against qkv of this device and dtype, in heads of `head_width`, or None."""
    if RELEASE is None:
        return "flash-attn is not installed"
    if device.type != _DEVICE:
        return f"flash-attn runs on a GPU, qkv is on {device}"
    if dtype not in _DTYPES:
        return f"flash-attn takes bfloat16, float16, qkv is {str(dtype).removeprefix('torch.')}"
    if head_width > _MAX_HEAD_WIDTH or head_width % 8:
        return f"flash-attn takes heads of up to {_MAX_HEAD_WIDTH}, a multiple of 8; they are {head_width} wide"
    capability = capability_of(device)
    if RELEASE == 2 and capability < (8, 0):
        return f"flash-attn needs compute capability 8.0, the GPU has {capability[0]}.{capability[1]}"
    if RELEASE == 4:
        if capability[0] not in (9, 10, 11):
            return (
                "the deterministic backward of flash-attn 4 needs compute capability 9, 10 or 11, "
                f"the GPU has {capability[0]}.{capability[1]}"
            )
        if capability[0] > 9 and head_width > _HEAD_WIDTH_ON_BLACKWELL and head_width != _MAX_HEAD_WIDTH:
            return f"flash-attn 4 takes heads of up to {_HEAD_WIDTH_ON_BLACKWELL} on this GPU, they are {head_width} wide"
    return _why_not_loaded()


def attention(qkv: Tensor, num_heads: int, q: Tensor | None) -> Tensor:
    """Compute ops.attention for inputs that `why_not` accepts and that hold at least one token."""
    # [N, T, 3 or 2, h, d]
    packed = _aligned(qkv).unflatten(2, (3 if q is None else 2, num_heads, -1))
    queries = None if q is None else _aligned(q).unflatten(2, (num_heads, -1))
    if RELEASE == 4:
        parts = packed.unbind(2)
        out, _ = _flash_attention_fwd(*parts) if queries is None else _flash_attention_fwd(queries, *parts)
    else:
        import flash_attn

        if queries is None:
            out = flash_attn.flash_attn_qkvpacked_func(packed, deterministic=True)
        else:
            out = flash_attn.flash_attn_kvpacked_func(queries, packed, deterministic=True)
    return out.flatten(2)


def _aligned(tensor: Tensor) -> Tensor:
    """Return `tensor`, or a copy if a row does not start at a multiple of 16 bytes."""
    # Where a tensor starts is not to be seen in compiled code.
    starts_aligned = torch.compiler.is_compiling() or tensor.storage_offset() * tensor.itemsize % _ALIGNMENT == 0
    rows_aligned = all(stride * tensor.itemsize % _ALIGNMENT == 0 for stride in tensor.stride()[:-1])
    if tensor.stride(-1) == 1 and starts_aligned and rows_aligned:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("maefast_flash_attn::fwd", mutates_args=())
def _flash_attention_fwd(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q (N, M, h, d), k and v (N, T, h, d) -> out (N, M, h, d), lse (N, h, M). Releases of 4 return
    more behind these two."""
    out, lse, *_ = importlib.import_module(_CUTE)._flash_attn_fwd(q, k, v, return_lse=True)
    return out, lse


@_flash_attention_fwd.register_fake
def _flash_attention_fwd_fake(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    N, M, h, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(N, h, M, dtype=torch.float32)


@torch.library.custom_op("maefast_flash_attn::bwd", mutates_args=())
def _flash_attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    backward = importlib.import_module(_CUTE)._flash_attn_bwd
    dq, dk, dv, *_ = backward(q, k, v, out, _aligned(dout), lse, deterministic=True)
    return dq, dk, dv


@_flash_attention_bwd.register_fake
def _flash_attention_bwd_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = _flash_attention_bwd(dout, *ctx.saved_tensors)
    return gradients


_flash_attention_fwd.register_autograd(_backward, setup_context=_setup_context)
