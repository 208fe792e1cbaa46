"""What reaches the driver through maefast's launches and through Triton's own. Without a GPU, the
driver is one that records its arguments."""

import pytest
import torch
import triton
from aot_cases import CASES
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from maefast.kernels import _common
from maefast.kernels._common import launch

DEVICE = 99  # of no real GPU: Triton keeps what it compiles by the device's number


class Driver:
    """As much of Triton's driver as a launch needs."""

    def __init__(self):
        self.launched = []
        self.utils = self
        self.launcher_cls = lambda source, metadata: self.note

    def note(self, *launch: object) -> None:
        *place, function, metadata, _ = launch[:7]  # the last: a new object for the hooks of profilers
        self.launched.append((*place, function, metadata, *launch[7:]))

    def get_current_device(self) -> int:
        return DEVICE

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[object, ...]:
        return "module", binary, 32, 0, 1024


DRIVER = Driver()  # one, since Triton keeps kernels with the driver that loaded them


@pytest.fixture
def launched(monkeypatch):
    monkeypatch.setattr(_common, "_compiled", {})
    monkeypatch.setattr(type(driver), "active", property(lambda self: DRIVER), raising=False)
    return DRIVER.launched


def assert_same(launched, kernel, grid, **arguments) -> None:
    """Launch twice by maefast and once by Triton: the same code, grid, stream and arguments."""
    launched.clear()
    for _ in range(2):
        launch(kernel, grid, **arguments)
    kernel[grid](**arguments)
    first, *others = launched
    assert len(others) == 2
    for other in others:
        assert len(other) == len(first)
        assert all(a is b or a == b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    "case",
    [
        "random_masking-patch16",
        "gather_patches-patch16-fp32",
        "unshuffle-512x197-fp32",
        "norms-768x50-bf16_fp32",
        "masked_mse-patch16-bf16_uint8-compact",
        "bias_gelu-768x50-bf16",
    ],
)
def test_each_kernel(launched, case):
    for recorded in CASES[case]():
        arguments = dict(zip(recorded.kernel.arg_names, recorded.args, strict=True))
        assert_same(launched, recorded.kernel, (3, 2), **arguments, **recorded.options)


@triton.jit
def _copy_kernel(x_ptr, y_ptr):
    at = tl.arange(0, 1024)
    tl.store(y_ptr + at, tl.load(x_ptr + at))


def test_each_kind_of_argument(launched):
    """One after the other, so that what was compiled for one would be launched for the next."""
    x, out, codes = torch.zeros(1028), torch.zeros(1024), []
    for source, y, warps in (
        (x[:1024], out, 1),
        (x[:1024], out, 2),
        (x[1:1025], out, 1),
        (x[:1024].half(), out, 1),
        (x[:1024].half(), out.half(), 1),
        (x[4:1028], out, 1),
    ):
        assert_same(launched, _copy_kernel, (1,), x_ptr=source, y_ptr=y, num_warps=warps)
        codes.append(launched[0][4])
    assert codes.pop() == codes[0]
    assert len(set(codes)) == 5


@triton.jit
def _scale_kernel(x_ptr, factor, shift_ptr):
    tl.store(x_ptr, tl.load(x_ptr) * factor)


def test_numbers_and_missing_tensors(launched):
    """Triton compiles other code for 1, for multiples of 16 and for integers of 64 bits."""
    x, codes = torch.zeros(4), set()
    for factor, shift in ((1, None), (16, None), (17, None), (32, None), (2**40, None), (2.0, None), (2.0, x), (1, None)):
        assert_same(launched, _scale_kernel, (2, 2, 2), x_ptr=x, factor=factor, shift_ptr=shift)
        codes.add(launched[0][4])
    assert len(codes) >= 4


def test_what_is_kept_is_bounded(launched, monkeypatch):
    monkeypatch.setattr(_common, "_MOST_COMPILED", 3)
    x = torch.zeros(4)
    for factor in range(1, 9):
        assert_same(launched, _scale_kernel, (1,), x_ptr=x, factor=factor, shift_ptr=None)
        assert len(_common._compiled) <= 3
