"""What every part of tune is timed with: graphs of an op, held against float64, in rotation."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import request
from ...testing.errors import breach
from ...testing.timing import Budget, CudaTimer, Run, rotate

GAIN = 1.05  # what a choice must gain over the default: less is noise
SETS = 2  # of inputs, that rotate
ROUNDS = 15
CHECKED = 8  # samples that are held against float64

Tensors = dict[str, Tensor]
Op = Callable[..., Tensor | tuple[Tensor, ...]]
Rotate = Callable[[Mapping[str, Run], int], dict[str, float]]  # runs, sets of inputs -> times


class Setting(NamedTuple):
    """The device and the inputs of all timings."""

    rotate: Rotate
    device: torch.device
    batch: int = 256
    half: torch.dtype = torch.bfloat16


class Graph:
    """An op on a backend and on inputs of its own: forward, and backward as often as asked."""

    def __init__(self, op: Op, inputs: Tensors, backend: str):
        self.op, self.inputs, self.backend = op, inputs, backend
        self.leaves = [tensor for tensor in inputs.values() if tensor.requires_grad]
        self.outputs = self.forward()
        self.incoming = [torch.randn(out.shape, device=out.device).to(out.dtype) for out in self.outputs]

    def forward(self) -> tuple[Tensor, ...]:
        with request.backend(self.backend):
            out = self.op(**self.inputs)
        return out if isinstance(out, tuple) else (out,)

    def backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.outputs, self.leaves, self.incoming, retain_graph=True)

    def results(self) -> list[Tensor]:
        """Compute outputs and gradients again and return them."""
        self.outputs = self.forward()
        return [out.detach() for out in self.outputs] + (list(self.backward()) if self.leaves else [])

    def on(self, backend: str, dtype: torch.dtype | None = None) -> "Graph":
        """Return the op on another backend, on these inputs and incoming gradients, in `dtype`."""

        def cast(name: str, t: Tensor) -> Tensor:
            wanted = t.dtype if dtype is None or name == "mask" or not t.is_floating_point() else dtype
            return t.detach().to(wanted).requires_grad_(t.requires_grad)

        twin = Graph(self.op, {name: cast(name, t) for name, t in self.inputs.items()}, backend)
        twin.incoming = [grad.to(out.dtype) for grad, out in zip(self.incoming, twin.outputs, strict=True)]
        return twin


def is_right(got: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor]) -> bool:
    return all(breach(*results) is None for results in zip(got, eager, exact, strict=True))


class Yardstick:
    """The results of a graph on the eager backend, in its dtypes and in float64."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.eager, self.exact = graph.on("eager").results(), graph.on("eager", torch.float64).results()

    def accepts(self, backend: str) -> bool:
        """Return whether the graph is right on `backend`, by the error rule."""
        return is_right(self.graph.on(backend).results(), self.eager, self.exact)


def medians_on(device: torch.device) -> Rotate:
    """Return a rotation that gives medians in seconds."""
    timer = CudaTimer(device)

    def medians(runs: Mapping[str, Run], sets: int) -> dict[str, float]:
        samples = rotate(runs, timer, Budget(seconds=0, least=ROUNDS, most=ROUNDS), sets)
        return {name: statistics.median(values) for name, values in samples.items()}

    return medians
