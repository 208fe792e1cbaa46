"""The CUDA kernels of attention on the CPU, over tests/cuda_emulator, each tile by the error
rule."""

import ctypes

import pytest
import torch
from emulated import compiled, cuda, linked, needs_emulator
from support import at_the_edge
from torch import Tensor

from maefast import ops, tuned
from maefast.testing.errors import assert_close_to_float64

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

pytestmark = [needs_emulator, pytest.mark.usefixtures("emulator", "poisoned")]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("emulator")
    sources = linked(folder)
    return compiled(folder, [sources / "attention_c.cpp", sources / "attention.cu"])


def attention(qkv: Tensor, dout: Tensor, h: int) -> dict[str, Tensor]:
    out, lse = cuda.attention_fwd(None, qkv, h)
    _, dqkv, dqkv_sum = cuda.attention_bwd(dout, None, qkv, out, lse, h, True)
    assert torch.equal(cuda.attention_bwd(dout, None, qkv, out, lse, h)[1], dqkv)
    return {"out": out, "dqkv": dqkv, "dqkv_sum": dqkv_sum}


def by_torch(qkv: Tensor, dout: Tensor, h: int, dtype: torch.dtype) -> dict[str, Tensor]:
    leaf = qkv.to(dtype).requires_grad_()
    out = ops.attention_ref(leaf, h)
    (dqkv,) = torch.autograd.grad(out, leaf, dout.to(dtype))
    return {"out": out.detach(), "dqkv": dqkv, "dqkv_sum": dqkv.sum(dim=(0, 1), dtype=torch.promote_types(dtype, F32))}


ROWS = {  # T of each tile's ends and of rows that do not fill it, by head width
    32: (1, 16, 49, 64, 65, 80, 81, 113, 197, 208, 209, 257, 288),
    64: (7, 50, 56, 64, 80, 100, 197, 208),
    80: (33, 64, 65, 72, 80),
}


@pytest.mark.parametrize(("d", "T"), [(d, T) for d, lengths in ROWS.items() for T in lengths])
def test_attention(emulator, d, T):
    """Neither old contents of shared memory nor the order of threads change a bit."""
    dtype = F16 if T % 8 == 0 else BF16
    N, h = (1, 1) if T > 80 else (3, 2)
    qkv, dout = torch.randn(N, T, 3 * h * d).to(dtype), torch.randn(N, T, h * d).to(dtype)
    results = []
    try:
        for seed, reverse in ((7, False), (1, True), (0, False)):
            emulator.emulator_seed(seed)
            emulator.emulator_reverse(reverse)
            results.append(attention(qkv, dout, h))
    finally:
        emulator.emulator_seed(0)
        emulator.emulator_reverse(False)
    eager, exact = by_torch(qkv, dout, h, dtype), by_torch(qkv, dout, h, torch.float64)
    for name, value in results[0].items():
        assert all(torch.equal(value, other[name]) for other in results), f"{name} depends on memory or order"
        assert_close_to_float64(f"T = {T}, d = {d}, {name}", value, eager[name], exact[name])


def tiles() -> list[tuple[str, int, int, int]]:
    """Table, head width, tokens and number of each line of attention_tiles.inc."""
    found = []
    for table, lines in tuned.attention_tables().items():
        for i, line in enumerate(lines):
            d, T = line["head_width"], line["tokens"]
            found.append((table, d, T, sum(other["head_width"] == d and other["tokens"] >= T for other in lines[:i])))
    return found


@pytest.mark.parametrize(("table", "d", "longest", "tile"), tiles())
def test_each_tile(emulator, table, d, longest, tile):
    """More heads than CTAs fit; rows that fill the tile and rows that do not. Tensors end or
    start at pages without access, and every value of the outputs is written."""
    N, h = 3, 2
    for T, end in ((longest, True), (longest - 11, False)):

        def placed(t: Tensor, end: bool = end) -> Tensor:
            return at_the_edge(t, end)

        qkv, dout = placed(torch.randn(N, T, 3 * h * d).bfloat16()), placed(torch.randn(N, T, h * d).bfloat16())
        sizes = (ctypes.c_int64(N), T, h, d, 1)
        out, lse = map(placed, cuda.attention_fwd(None, qkv, h))
        if table == "FORWARD":
            got = {"out": torch.full_like(out, torch.nan), "lse": torch.full_like(lse, torch.nan)}
            run, inputs = emulator.attention_c_fwd, (qkv,)
        else:
            partial, total = torch.full((N, 3 * h * d), torch.nan), torch.full((3 * h * d,), torch.nan)
            got = {"dqkv": torch.full_like(qkv, torch.nan), "partial": partial, "dqkv_sum": total}
            run, inputs = emulator.attention_c_bwd, (qkv, out, lse, dout)
        got = {name: placed(t) for name, t in got.items()}
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (*inputs, *got.values()))
        assert run(*pointers, *sizes, tile, None) == 0
        if table == "FORWARD":
            torch.testing.assert_close(got.pop("lse"), lse, rtol=1e-5, atol=1e-5)
        else:
            first, second, third = got.pop("partial")
            assert torch.equal(first + second + third, got["dqkv_sum"])
        eager, exact = by_torch(qkv, dout, h, BF16), by_torch(qkv, dout, h, torch.float64)
        for name, value in got.items():
            assert_close_to_float64(f"T = {T}, {name}", value, eager[name], exact[name])


def test_the_op_takes_a_tile_by_number(emulator):
    qkv, dout = torch.randn(2, 50, 384).bfloat16(), torch.randn(2, 50, 128).bfloat16()
    out, lse = cuda.attention_fwd(None, qkv, 2)
    dqkv = cuda.attention_bwd(dout, None, qkv, out, lse, 2)[1]

    def forward(tile: int) -> Tensor:
        return cuda.attention_fwd(None, qkv, 2, tile)[0]

    def backward(tile: int) -> Tensor:
        return cuda.attention_bwd(dout, None, qkv, out, lse, 2, False, tile)[1]

    for direction, run, expected in (("fwd", forward, out), ("bwd", backward, dqkv)):
        count = len(tuned.fitting_tiles(direction, 64, 50))
        assert count > 2
        for tile in range(count):
            torch.testing.assert_close(run(tile), expected, rtol=0.05, atol=0.05)
        for tile in (-1, count):
            message = f"tile must be one of the {count} that take 50 tokens of heads 64 wide, it is {tile}"
            with pytest.raises(ValueError, match=message):
                run(tile)


def test_attention_of_nothing():
    for shape in ((0, 50, 384), (2, 0, 384)):
        qkv = torch.empty(shape, dtype=BF16)
        out, lse = cuda.attention_fwd(None, qkv, 2)
        _, dqkv, dqkv_sum = cuda.attention_bwd(torch.empty_like(out), None, qkv, out, lse, 2, True)
        assert (out.shape, lse.shape, dqkv.shape) == ((*shape[:2], 128), (shape[0], 2, shape[1]), shape)
        assert torch.equal(dqkv_sum, torch.zeros(384))
