"""What differs between releases of torch, and every private name of torch that maefast needs: asked for here alone."""

import re
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

# Device types that autocast knows. Dynamo of torch 2.11 does not trace torch.amp.is_autocast_available.
AUTOCAST_DEVICES = frozenset(
    device for device in ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu") if torch.amp.is_autocast_available(device)
)


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of `module` runs a hook."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or _has_any_global_hook()


def is_compiled(module: nn.Module) -> bool:
    """Whether module.compile() was called."""
    return module._compiled_call_impl is not None


def checkpointing() -> Any:
    """The module of wrappers that recompute activations in the backward pass."""
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

    return checkpoint_wrapper


def sdpa_backend(q: Tensor, k: Tensor, v: Tensor) -> int:
    """The torch.nn.attention.SDPBackend, as a number, that scaled_dot_product_attention runs on these inputs."""
    return torch._fused_sdp_choice(q, k, v)


def sleep_on_gpu(cycles: int) -> None:
    """Keep the current CUDA stream busy for `cycles` of its clock."""
    torch.cuda._sleep(cycles)
