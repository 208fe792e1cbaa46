"""Contenders of an op on the same inputs: plain torch, eager and compiled, and our backends."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from rotation import NotOursError
from torch import Tensor
from traffic import Passes

import maefast
from maefast import dispatch, request
from maefast.testing.errors import assert_close_to_float64
from maefast.testing.timing import Run

Inputs = dict[str, Tensor]
Outputs = dict[str, Tensor]
OURS = ("native", "triton")  # backends whose kernels are maefast's
GPU_BATCH = 1024  # images; fewer fit into the L2 cache of a GPU
SETS = 3  # input sets that a rotation cycles through
INCOMING = ("dy", "dtotal")  # inputs that are the gradients of the outputs y and total


@dataclass(frozen=True)
class OpEntry:
    """The benchmark of an op: inputs, plain torch, the maefast call, and its bytes and FLOPs."""

    name: str
    variants: tuple[str, ...]
    make: Callable[[int, str, torch.Generator], Inputs]  # (N, variant, generator)
    plain: Callable[..., Outputs]
    fused: Callable[..., Outputs]
    leaves: tuple[str, ...]  # get gradients where given: of each output `o` against the input `d<o>`, else of the first output
    ops: tuple[str, ...]  # that `fused` calls
    bytes: Callable[[int, Inputs, Outputs], Passes] = lambda N, x, y: Passes(0)
    flops: Callable[[int], Passes] = lambda N: Passes(0)
    backends: tuple[str, ...] = (*OURS, "eager")
    on_gpu: tuple[tuple[str, Callable[..., Outputs]], ...] = ()  # contenders that are not maefast's


@dataclass(frozen=True)
class OpWorkload:
    entry: OpEntry
    variant: str
    N: int
    device: torch.device
    forward: bool = False  # alone, without gradients

    eager_name = "reference"
    compiled_name = "reference-compiled"
    images = None

    @property
    def name(self) -> str:
        return f"{self.entry.name}-{self.variant}" + ("-forward" if self.forward else "")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.variant.startswith("bf16") else torch.float32

    @property
    def contenders(self) -> list[str]:
        ours, others = (f"maefast-{backend}" for backend in self.entry.backends), dict(self.entry.on_gpu)
        return [self.eager_name, self.compiled_name, *ours, *(others if self.device.type == "cuda" else ())]

    def bench(self) -> "OpBench":
        return OpBench(self)


def workloads_of(entry: OpEntry, variant: str, device: torch.device, full: bool, quick: int, most: int) -> list[OpWorkload]:
    """Return the workload of a variant; at full size on a GPU, also that of the forward pass."""
    if not full or device.type != "cuda":
        return [OpWorkload(entry, variant, most if full else quick, device)]
    return [OpWorkload(entry, variant, GPU_BATCH, device, forward) for forward in ((False, True) if entry.leaves else (False,))]


class OpBench:
    """The inputs of a workload, and its contenders."""

    sets = SETS

    def __init__(self, workload: OpWorkload):
        self.workload, self.entry = workload, workload.entry
        generator = torch.Generator(workload.device).manual_seed(0)
        with workload.device:  # a CPU takes minutes to draw the values of 1,024 images
            self.inputs = [self.entry.make(workload.N, workload.variant, generator) for _ in range(SETS)]
        self.inputs = [{k: v.to(workload.device) for k, v in inputs.items()} for inputs in self.inputs]
        self.leaves = [leaf for leaf in self.entry.leaves if leaf in self.inputs[0] and not workload.forward]
        for inputs in self.inputs:
            for leaf in self.leaves:
                inputs[leaf].requires_grad_()

    def why_not(self, contender: str) -> str | None:
        """Return why the op refuses a call, or None."""
        backend, foreign = contender.removeprefix("maefast-"), contender in dict(self.entry.on_gpu)
        if not foreign:
            if backend in (contender, "auto"):
                return None
            for op in self.entry.ops:
                if not dispatch.binds(backend, dispatch.OPS[op], self.workload.device):
                    return f"there is no {backend} kernel of {op} for {self.workload.device.type}"
        try:
            self.run(contender)(0)
        except RuntimeError as refusal:
            if not (foreign or isinstance(refusal, request.CannotRunError)):
                raise
            return str(refusal).splitlines()[0]
        return None

    def run(self, contender: str) -> Run:
        others = {self.workload.eager_name: self.entry.plain, **dict(self.entry.on_gpu)}
        if contender == self.workload.compiled_name:
            others[contender] = torch.compile(self.entry.plain, fullgraph=True, dynamic=False)
        if (other := others.get(contender)) is not None:
            return lambda i: self._apply(other, self.inputs[i])

        def forced(i: int) -> Outputs:
            with maefast.backend(contender.removeprefix("maefast-")):
                return self._apply(self.entry.fused, self.inputs[i])

        return forced

    def _apply(self, function: Callable[..., Outputs], inputs: Inputs) -> Outputs:
        """Return the outputs, and the gradients of the leaves as d_<leaf>."""
        incoming = {name: value for name, value in inputs.items() if name in INCOMING}
        out = function(**{name: value for name, value in inputs.items() if name not in incoming})
        if not self.leaves:
            return out
        outputs = [out[name.removeprefix("d")] for name in incoming] or [next(iter(out.values()))]
        grads = torch.autograd.grad(outputs, [inputs[leaf] for leaf in self.leaves], list(incoming.values()) or None)
        return out | {f"d_{leaf}": grad for leaf, grad in zip(self.leaves, grads, strict=True)}

    @cached_property
    def exact(self) -> Outputs:
        def exact(inputs: Inputs) -> Inputs:
            wide = {k: v.detach().double() if v.is_floating_point() else v for k, v in inputs.items()}
            return {k: v.requires_grad_(inputs[k].requires_grad) for k, v in wide.items()}

        return stack(self._apply(self.entry.plain, exact(inputs)) for inputs in self.inputs)

    @cached_property
    def eager(self) -> Outputs:
        return stack(self._apply(self.entry.plain, inputs) for inputs in self.inputs)

    def check(self, contender: str, run: Run) -> None:
        """Check all input sets: indices must be equal, everything else within the error rule."""
        try:
            self._compare(contender, stack(run(i) for i in range(SETS)))
        except AssertionError as breach:
            if contender.removeprefix("maefast-") in (*OURS, "auto"):
                raise
            raise NotOursError(str(breach)) from None

    def _compare(self, contender: str, got: Outputs) -> None:
        for name, exact in self.exact.items():
            where, dtype = f"{self.workload.name}, {contender}, {name}", self.eager[name].dtype
            assert got[name].dtype == dtype, f"{where}: is {got[name].dtype}, the reference's {dtype}"
            if exact.is_floating_point():
                assert_close_to_float64(where, got[name], self.eager[name], exact.double())
            else:
                assert torch.equal(got[name], exact), f"{where}: differs from the reference"

    @cached_property
    def bytes(self) -> int:
        return self._of_passes(self.entry.bytes(self.workload.N, self.inputs[0], self.eager))

    @property
    def flops(self) -> int:
        return self._of_passes(self.entry.flops(self.workload.N))

    def _of_passes(self, counted: Passes) -> int:
        return counted.forward if self.workload.forward else sum(counted)

    def forget(self) -> None:
        """Free the expected results of the gate."""
        for name in ("exact", "eager"):
            self.__dict__.pop(name, None)


def stack(outputs: Iterable[Outputs]) -> Outputs:
    """Stack the outputs of SETS runs, one run in memory at a time."""
    stacked: Outputs = {}
    for i, out in enumerate(outputs):
        for name, value in out.items():
            stacked.setdefault(name, value.new_empty(SETS, *value.shape))[i] = value.detach()
    return stacked
