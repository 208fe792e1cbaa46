"""Choose the backend of an op: the requested one, which never falls back, or the fastest that can
run. What its kernels take and in which order they are tried stands in the file of the op."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from . import _library, gpu
from .request import BACKENDS, CannotRunError, checked, remembered, requested, why_absent

Ask = Any  # a NamedTuple: `device`, the dtype of each tensor argument, and what else decides
Dtypes = tuple[torch.dtype, ...]

FLOATS: Dtypes = (torch.float32, torch.bfloat16, torch.float16)
IMAGES: Dtypes = (*FLOATS, torch.uint8)
_DEVICES = {"cpu": "the CPU", "cuda": "a GPU"}


@dataclass(frozen=True)
class Kernel:
    """The devices, dtypes and sizes that the kernels of one backend take."""

    backend: str
    devices: tuple[str, ...]  # types; empty for all
    dtypes: Dtypes | Mapping[str, Dtypes] = FLOATS  # of every tensor, or by argument; others any
    capability: tuple[int, int] = (8, 0)  # the least of a GPU
    why_not: Callable[[Ask], str | None] = lambda ask: None  # why it cannot run, in one sentence
    why_slow: Callable[[Ask], str | None] = lambda ask: None  # why `auto` passes over it


@dataclass(frozen=True, eq=False)
class Op:
    """An op and its kernels."""

    name: str
    kernels: tuple[Kernel, ...]
    auto: Mapping[str, tuple[str, ...]]  # type of device -> backends to try, the fastest first
    example: Callable[[torch.device, torch.dtype], Ask]  # the ask of a usual call

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
    kernel = _kernel_of(op, backend, device)
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
    kernel = _kernel_of(op, backend, ask.device.type)
    return None if kernel is None else kernel.why_slow(ask)


def _kernel_of(op: Op, backend: str, device: str) -> Kernel | None:
    return next((k for k in op.kernels if k.backend == backend and device in (k.devices or (device,))), None)


def check_backend(op: Op, name: str, source: str) -> None:
    """Raise ValueError for a backend that `op` lacks, RuntimeError for one not installed."""
    mine = {kernel.backend for kernel in op.kernels} | {"eager"}
    checked(name, source, tuple(backend for backend in BACKENDS if backend in mine))


def binds(name: str, op: Op, device: torch.device) -> bool:
    """Return whether a request for the backend `name` applies to `op` on `device`: if it has a
    kernel of `op` there. A backend without any kernel there applies to its ops, which refuse."""
    if name == "eager" or _kernel_of(op, name, device.type) is not None:
        return True
    served = any(_kernel_of(other, name, device.type) for other in OPS.values())
    return not served and any(kernel.backend == name for kernel in op.kernels)


def request_for(op: Op, device: torch.device, asked: str = "auto") -> str | None:
    """Return the backend that `op` must run on: the process's request, the caller's, or None."""
    if (name := requested()) is not None and binds(name, op, device):
        return name
    return None if asked == "auto" else asked


@remembered
def choose(op: Op, ask: Ask, asked: str = "auto") -> str:
    """Return the backend that runs `op`; `asked` is the caller's request. Raises RuntimeError with
    the reason if a requested backend cannot run."""
    if (name := request_for(op, ask.device, asked)) is not None:
        if (reason := why_not(op, name, ask)) is not None:
            raise CannotRunError(f"maefast.ops.{op.name} cannot run on the requested backend {name!r}: {reason}")
        return name
    for name in op.auto.get(ask.device.type, ()):
        if why_passed_over(op, name, ask) is None and why_not(op, name, ask) is None:
            return name
    return "eager"


def ops_of(backend: str) -> Any:
    """Return the namespace of torch.ops with the kernels of `backend`: `<op>_fwd`, `<op>_bwd`."""
    return torch.ops.maefast_triton if backend == "triton" else torch.ops.maefast


if not _library.HAS_NATIVE:
    warnings.warn("maefast runs without its native kernels: everything works, slower", UserWarning, stacklevel=2)
