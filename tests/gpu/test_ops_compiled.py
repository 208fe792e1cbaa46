"""All ops on a GPU in one function, by inductor and in CUDA graphs: the same bits as without."""

import pytest
import torch
from support import assert_equal
from tritonrun import run_step, step, step_inputs

from maefast import _library, kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or not kernels.HAS_TRITON, reason="needs a GPU and Triton")

NATIVE = pytest.param("native", marks=pytest.mark.skipif(not _library.HAS_CUDA, reason="needs a build with CUDA kernels"))


@pytest.mark.parametrize("backend", [NATIVE, "triton"])
@pytest.mark.parametrize(("mode", "batches"), [(None, (2, 3, 4)), ("reduce-overhead", (3, 3, 3))])
def test_compiled(mode, batches, backend, fresh_dynamo):
    compiled = torch.compile(step, fullgraph=True, mode=mode)
    for N in batches:
        inputs = step_inputs(N)
        torch.compiler.cudagraph_mark_step_begin()
        assert_equal(run_step(compiled, inputs, backend), run_step(step, inputs, backend))


@pytest.mark.parametrize("backend", [NATIVE, "triton"])
def test_graph(backend):
    """Forward and backward are captured once and replayed on other values."""
    inputs = step_inputs(3)
    run_step(step, inputs, backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_step(step, inputs, backend)
    with torch.no_grad():
        for t in inputs:
            t.copy_(torch.randn_like(t))
    graph.replay()
    assert_equal(captured, run_step(step, inputs, backend))
