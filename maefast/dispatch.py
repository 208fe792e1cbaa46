"""Choose the backend of an op: the fastest that can run, or the one that was asked for.

An op says in its own file what its kernels take (`Kernel`) and in which order `auto` tries them
(`Op`); this module walks. A request (request.py) never falls back: it raises.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from . import _library, gpu
from .request import BACKENDS, CannotRunError, checked, remembered, requested, why_absent

# a NamedTuple: `device`, the dtype of each tensor under its argument's name, and what else a choice
# depends on
Ask = Any
Dtypes = tuple[torch.dtype, ...]

FLOATS: Dtypes = (torch.float32, torch.bfloat16, torch.float16)
IMAGES: Dtypes = (*FLOATS, torch.uint8)
_DEVICES = {"cpu": "the CPU", "cuda": "a GPU"}


def _no_reason(ask: Ask) -> str | None:
    return None


@dataclass(frozen=True)
class Kernel:
    """The devices, dtypes and sizes that the kernels of one backend take.

    devices      types of device; empty for all
    dtypes       of every tensor, or by argument; arguments that are not named may have any
    capability   the least compute capability of a GPU
    why_not      the reason why an ask cannot be run, in one sentence, or None
    why_slow     the reason why `auto` passes over a kernel that could run, or None
    """

    backend: str
    devices: tuple[str, ...]
    dtypes: Dtypes | Mapping[str, Dtypes] = FLOATS
    capability: tuple[int, int] = (8, 0)
    why_not: Callable[[Ask], str | None] = _no_reason
    why_slow: Callable[[Ask], str | None] = _no_reason


@dataclass(frozen=True, eq=False)
class Op:
    """The kernels of an op, and the backends that `auto` tries on each type of device, the fastest
    first.

    example   makes the ask of a usual call for a device and a dtype
    """

    name: str
    kernels: tuple[Kernel, ...]
    auto: Mapping[str, tuple[str, ...]]
    example: Callable[[torch.device, torch.dtype], Ask]

    def __post_init__(self) -> None:
        OPS[self.name] = self


OPS: dict[str, Op] = {}


def names_of(dtypes: Dtypes) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def why_not(op: Op, backend: str, ask: Ask) -> str | None:
    """Return None where `backend` can run `op`, else the reason, in one sentence."""
    if backend == "eager":
        return None
    if (reason := why_absent(backend)) is not None:
        return reason
    mine = [kernel for kernel in op.kernels if kernel.backend == backend]
    if not mine:
        return f"there is no {backend} kernel of {op.name}"
    dtypes = {name: value for name, value in ask._asdict().items() if isinstance(value, torch.dtype)}
    first, device = next(iter(dtypes)), ask.device.type
    kernel = next((kernel for kernel in mine if _serves(kernel, backend, device)), None)
    if kernel is None:
        devices = " and on ".join(_DEVICES[name] for kernel in mine for name in kernel.devices)
        return f"{backend} {op.name} runs on {devices}, {first} is on {ask.device}"
    if device == "cuda":
        if backend == "native" and not _library.HAS_CUDA:
            return "maefast was built without CUDA kernels"
        if (capability := gpu.capability(ask.device)) < kernel.capability:
            needed, has = (".".join(map(str, version)) for version in (kernel.capability, capability))
            return f"{backend} {op.name} needs compute capability {needed}, {first} is on a GPU of {has}"
    for name, dtype in dtypes.items():
        taken = kernel.dtypes if isinstance(kernel.dtypes, tuple) else kernel.dtypes.get(name, (dtype,))
        if dtype not in taken:
            return f"{backend} {op.name} takes {names_of(taken)}, {name} is {names_of((dtype,))}"
    return kernel.why_not(ask)


def why_passed_over(op: Op, backend: str, ask: Ask) -> str | None:
    """Return the reason why `auto` leaves `backend` alone although it can run, or None."""
    if backend == "eager":
        return None
    if backend not in op.auto.get(ask.device.type, ()):
        return f"no measurement shows that {backend} {op.name} is faster"
    return next((kernel.why_slow(ask) for kernel in op.kernels if _serves(kernel, backend, ask.device.type)), None)


def _serves(kernel: Kernel, backend: str, device: str) -> bool:
    return kernel.backend == backend and (not kernel.devices or device in kernel.devices)


def check_backend(op: Op, name: str, source: str) -> None:
    """Raise ValueError unless `name` is "auto", "eager" or a backend of `op`, RuntimeError where it
    is not installed."""
    mine = {kernel.backend for kernel in op.kernels} | {"eager"}
    checked(name, source, tuple(backend for backend in BACKENDS if backend in mine))


def binds(name: str, op: Op, device: torch.device) -> bool:
    """Return whether a request for the backend `name` applies to `op` on `device`.

    It applies to each op of which the backend has a kernel on this type of device. A backend that
    has no kernel at all there applies to all of its ops, which then refuse.
    """
    if name == "eager":
        return True
    served = any(_serves(kernel, name, device.type) for other in OPS.values() for kernel in other.kernels)
    return any(_serves(kernel, name, device.type) if served else kernel.backend == name for kernel in op.kernels)


def request_for(op: Op, device: torch.device, asked: str = "auto") -> str | None:
    """Return the backend that `op` must run on: the process's request where it binds `op`, else the
    caller's, else None."""
    if (name := requested()) is not None and binds(name, op, device):
        return name
    return None if asked == "auto" else asked


@remembered
def choose(op: Op, ask: Ask, asked: str = "auto") -> str:
    """Return the backend that runs `op`; `asked` is the caller's request, which one for the process
    overrides.

    Raises RuntimeError with the reason where the requested backend cannot run.
    """
    if (name := request_for(op, ask.device, asked)) is not None:
        if (reason := why_not(op, name, ask)) is not None:
            raise CannotRunError(f"maefast.ops.{op.name} cannot run on the requested backend {name!r}: {reason}")
        return name
    for name in op.auto.get(ask.device.type, ()):
        if why_passed_over(op, name, ask) is None and why_not(op, name, ask) is None:
            return name
    return "eager"


def ops_of(backend: str) -> Any:
    """Return the namespace of torch.ops that holds the kernels of `backend`, `<op>_fwd` and
    `<op>_bwd`; eager has none."""
    return torch.ops.maefast_triton if backend == "triton" else torch.ops.maefast


if not _library.HAS_NATIVE:
    warnings.warn("maefast runs without its native kernels: everything works, slower", UserWarning, stacklevel=2)
