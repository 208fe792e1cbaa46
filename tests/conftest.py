"""Fixtures: seeds, backends, instruction sets, poisoned memory."""

import os
from collections.abc import Iterator

import pytest
import support
import torch
import torch.distributed as dist
from skips import pytest_terminal_summary  # noqa: F401

import maefast
from maefast.request import forget
from maefast.train import step

GIB = 1 << 30


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "huge: more than 2^31 elements; takes up to 6 GiB of memory and ten seconds")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("huge"):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if free < 8 * GIB:
            pytest.skip(f"needs 8 GiB of free memory, there are {free / GIB:.1f}")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _decisions() -> Iterator[None]:
    """Decisions of a test that changes what the machine has are not those of the next."""
    yield
    forget()


@pytest.fixture(autouse=True)
def _no_group() -> Iterator[None]:
    """A test leaves no process group: a run of the next test would join it."""
    yield
    assert not (dist.is_available() and dist.is_initialized())


@pytest.fixture
def native() -> None:
    """The test needs the native library."""
    if not support.NATIVE:
        pytest.skip("maefast was installed without its native library")


@pytest.fixture(params=support.ISAS)
def isa(request: pytest.FixtureRequest, native: None) -> Iterator[str]:
    """Runs the test on each instruction set of the native kernels that this process may use."""
    from maefast import _C

    if request.param not in support.USABLE_ISAS:
        pytest.skip(f"this CPU has no {request.param}, or MAEFAST_CPU_ISA forces a narrower instruction set")
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    assert _C.cpu_isa() == request.param
    yield request.param
    _C.set_cpu_isa(before)


@pytest.fixture(params=support.BACKENDS)
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with each backend forced."""
    with maefast.backend(request.param):
        yield request.param


@pytest.fixture
def poisoned(request: pytest.FixtureRequest) -> Iterator[None]:
    """Memory that a kernel does not write holds 3e38 or a bad index; not in huge tests."""
    if request.node.get_closest_marker("huge"):
        yield
        return
    with support.poisoned_memory():
        yield


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """GraphedStep without a GPU: a capture only warms up, a replay runs the step."""

    class Replay:
        def __init__(self, run, loss):
            self.run, self.loss = run, loss

        def replay(self):
            self.loss.copy_(self.run())

    def captured(run, device):
        generator = torch.get_rng_state()
        losses = [run() for _ in range(step.WARM_UP)]
        torch.set_rng_state(generator)
        return Replay(run, losses[-1]), losses[-1]

    monkeypatch.setattr(step, "_captured", captured)
    monkeypatch.setattr(step, "require_cuda", lambda device: None)
