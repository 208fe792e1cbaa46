"""Differences between releases of torch, and every private name of torch that maefast needs."""

import re
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

OLDEST = (2, 10)


def check_version(version: str) -> None:
    """Raise ImportError unless `version` is that of a torch that maefast runs beside."""
    release = re.match(r"(\d+)\.(\d+)", version)
    if release is None or (int(release[1]), int(release[2])) < OLDEST:
        raise ImportError(f"maefast needs torch {OLDEST[0]}.{OLDEST[1]} or newer; the installed torch is {version}")


check_version(torch.__version__)

# types that autocast knows; torch 2.11 does not trace torch.amp.is_autocast_available
AUTOCAST_DEVICES = frozenset(
    device for device in ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu") if torch.amp.is_autocast_available(device)
)


def has_own_rule(weight: Tensor) -> bool:
    """Return whether `weight` has a __torch_function__ of its own, as torchao's quantised do."""
    kind = type(weight)
    return kind not in (Tensor, nn.Parameter) and kind.__torch_function__ is not torch._C._disabled_torch_function_impl


def is_hooked(module: nn.Module) -> bool:
    """Return whether a call of `module` runs a hook."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or _has_any_global_hook()


def has_kernel(op: str, key: str) -> bool:
    """Return whether an op, "maefast::linear_fwd", has a kernel for a key, "CPU" or "CUDA"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(op, key)


def is_compiled(module: nn.Module) -> bool:
    """Return whether module.compile() was called."""
    return module._compiled_call_impl is not None


def sdpa_backend(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Return the number of the SDPBackend that scaled_dot_product_attention runs on."""
    return torch._fused_sdp_choice(q, k, v)


def sleep_on_gpu(cycles: int) -> None:
    """Keep the current CUDA stream busy for `cycles` of its clock."""
    torch.cuda._sleep(cycles)


def in_onnx_export() -> bool:
    """Return whether torch.onnx.export runs, also in code that torch.compile traces."""
    flags = sys.modules.get("torch.onnx._internal.exporter._flags")
    return getattr(flags, "_is_onnx_exporting", False) or torch.onnx.is_in_onnx_export()


def is_exporting() -> bool:
    """Return whether torch.export runs: torch.compiler.is_exporting(), which before torch 2.12 is
    true under torch.compile, too."""
    return torch.compiler._is_exporting_flag


def checkpointed(module: nn.Module, use_reentrant: bool, **options: Any) -> nn.Module:
    """Return a module that calls `module` under activation checkpointing. options: of
    torch.utils.checkpoint.checkpoint."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

    impl = CheckpointImpl.REENTRANT if use_reentrant else CheckpointImpl.NO_REENTRANT
    return checkpoint_wrapper(module, checkpoint_impl=impl, **options)


def without_checkpointing(module: nn.Module) -> nn.Module:
    """Return the module that `checkpointed` wraps, or the module itself."""
    return getattr(module, "_checkpoint_wrapped_module", module)
