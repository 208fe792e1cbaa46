import math

import pytest
import torch
import torch.nn.functional as F
from support import IMAGE_LAYOUTS, LAYOUTS, assert_equal, assert_same_for_any_threads, check_op, widened
from torch import Tensor

import maefast
from maefast import ops

pytestmark = pytest.mark.usefixtures("poisoned")

F32, BF16, F16, U8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8
FLOATS = (F32, BF16, F16)
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def images(N: int, C: int, H: int, W: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randint(256, (N, C, H, W), dtype=U8) if dtype == U8 else torch.randn(N, C, H, W).to(dtype)


def gather_by_loops(imgs: Tensor, ids: Tensor, ph: int, pw: int) -> Tensor:
    columns = imgs.shape[3] // pw
    rows = [[(i // columns * ph, i % columns * pw) for i in row] for row in ids.tolist()]
    patches = [[img[:, y : y + ph, x : x + pw].flatten() for y, x in row] for img, row in zip(imgs, rows, strict=True)]
    return torch.stack([torch.stack(row) for row in patches])


def test_order_by_hand(each_backend):
    imgs = torch.arange(2 * 4 * 6, dtype=F32).reshape(1, 2, 4, 6)  # channel 1 is channel 0 + 24
    out = ops.gather_patches(imgs, torch.tensor([[3, 1]]), (2, 3))
    fourth = [15, 16, 17, 21, 22, 23, 39, 40, 41, 45, 46, 47]  # rows 2-3, columns 3-5
    second = [3, 4, 5, 9, 10, 11, 27, 28, 29, 33, 34, 35]  # rows 0-1, columns 3-5
    assert out.tolist() == [[fourth, second]]


def test_reference_is_the_definition():
    imgs, ids = images(3, 4, 14, 15), torch.randint(6, (3, 5))
    assert torch.equal(ops.gather_patches_ref(imgs, ids, (7, 5), None, None, F32), gather_by_loops(imgs, ids, 7, 5))


def test_a_gemm_on_all_patches_is_the_convolution(each_backend):
    imgs, weight = torch.randint(-9, 9, (2, 3, 16, 24)).float(), torch.randint(-9, 9, (5, 3, 8, 4)).float()  # exact in fp32
    patches = ops.gather_patches(imgs, torch.arange(12).expand(2, -1), (8, 4))
    assert torch.equal(patches @ weight.flatten(1).T, F.conv2d(imgs, weight, stride=(8, 4)).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("dtype", FLOATS, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("C", [1, 3, 4, 13])
@pytest.mark.parametrize("patch", [(1, 1), (2, 2), (7, 5), (14, 14), (16, 16), (3, 40)], ids=str)
def test_pixels_are_copied(isa, patch, C, dtype):
    imgs, ids = images(3, C, 3 * patch[0], 4 * patch[1], dtype), torch.randint(12, (3, 7))
    assert_equal(ops.gather_patches(imgs, ids, patch), gather_by_loops(imgs, ids, *patch))


@pytest.mark.parametrize("out_dtype", FLOATS, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dtype", FLOATS, ids=["from_fp32", "from_bf16", "from_fp16"])
def test_conversion(isa, dtype, out_dtype):
    imgs, ids = images(2, 3, 21, 10, dtype), torch.randint(6, (2, 6))
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 3.4e38, -3.4e38, 1e-40, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20]
    imgs[0, 0].view(-1)[: len(special)] = torch.tensor(special).to(dtype)
    ids[0, 0] = 0
    out = ops.gather_patches(imgs, ids, (7, 5), dtype=out_dtype)
    expected = gather_by_loops(imgs, ids, 7, 5).to(out_dtype)
    assert expected.isnan().any()
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out.signbit() & (out == 0), expected.signbit() & (expected == 0))


def all_patterns(dtype: torch.dtype) -> Tensor:
    """Every value of a 16-bit dtype, as an image."""
    return torch.arange(2**16).to(torch.int16).view(dtype).reshape(1, 1, 256, 256)


def whole_image(imgs: Tensor, dtype: torch.dtype) -> Tensor:
    """The pixels of one image of one channel as they come out of the kernel."""
    ids = torch.zeros(1, 1, dtype=torch.int64)
    return ops.gather_patches(imgs, ids, tuple(imgs.shape[2:]), dtype=dtype).reshape(imgs.shape)


def test_every_fp16_value_is_widened_by_its_definition(isa):
    half = all_patterns(F16)
    bits = half.view(torch.int16).int()
    exponent, fraction = bits >> 10 & 31, bits & 1023
    value = torch.where(exponent == 0, fraction * 2.0**-24, (1024 + fraction) * torch.exp2(exponent - 25.0))
    value[exponent == 31] = torch.where(fraction == 0, math.inf, math.nan)[exponent == 31]
    expected = torch.where(bits < 0, -value, value)
    for imgs, wanted in ((half, expected), (half.mT, expected.mT)):  # dense and strided rows
        out = whole_image(imgs, F32)
        torch.testing.assert_close(out, wanted, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(out.signbit(), wanted.signbit())
        assert torch.equal(whole_image(imgs, F16).view(torch.int16), imgs.contiguous().view(torch.int16))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
def test_rounding(isa, dtype):
    """Every value, ties and their neighbours, overflow, fp32 patterns from end to end."""
    values = all_patterns(dtype).flatten().double()
    values = values[values.isfinite() & (values >= 0)].unique()
    above = torch.cat([values[1:], 2 * values[-1:] - values[-2:-1]])
    ties = (values + above) / 2
    assert torch.equal(ties.float().double(), ties)
    up, down = (torch.nextafter(ties.float(), torch.tensor(end)) for end in (math.inf, -math.inf))
    patterns = torch.arange(-(2**31), 2**31, 4099).to(torch.int32).view(F32)
    single = torch.cat([values.float(), ties.float(), up, down, torch.tensor([math.inf, 3.4e38, 1e-45]), patterns])
    single = torch.cat([single, -single])
    imgs = torch.cat([single, torch.zeros(-len(single) % 64)]).reshape(1, 1, 64, -1)
    expected = imgs.to(dtype)
    assert expected.isnan().any()
    for pixels, wanted in ((imgs, expected), (imgs.mT, expected.mT)):  # dense and strided rows
        out = whole_image(pixels, dtype)
        assert torch.equal(out.isnan(), wanted.isnan())
        number = ~wanted.isnan()
        assert torch.equal(out[number].view(torch.int16), wanted[number].view(torch.int16))


@pytest.mark.parametrize("normalised", [True, False], ids=["mean_std", "plain"])
@pytest.mark.parametrize("out_dtype", FLOATS, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("patch", [(1, 1), (7, 5), (16, 16)], ids=str)
def test_uint8(isa, patch, out_dtype, normalised):
    statistics = (MEAN, STD) if normalised else ()
    cases = [{"imgs": images(2, 3, 4 * patch[0], 3 * patch[1], U8)} for _ in range(3)]
    ids = torch.randint(12, (2, 6))

    def op(imgs: Tensor) -> Tensor:
        if imgs.dtype == torch.float64:
            return ops.gather_patches(imgs, ids, patch)
        return ops.gather_patches(imgs, ids, patch, *statistics, dtype=None if out_dtype == F32 else out_dtype)

    check_op(op, cases, exact=lambda inputs: {"imgs": widened(inputs["imgs"], *statistics)})


def test_uint8_by_hand(each_backend):
    imgs = torch.tensor([0, 51, 255, 102], dtype=U8).reshape(1, 1, 2, 2)
    out = ops.gather_patches(imgs, torch.tensor([[0]]), 2, torch.tensor([0.2]), torch.tensor([0.5]))
    torch.testing.assert_close(out, torch.tensor([[[-0.4, 0.0, 1.6, 0.4]]]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS.values(), ids=IMAGE_LAYOUTS)
@pytest.mark.parametrize("dtype", [*FLOATS, U8], ids=["fp32", "bf16", "fp16", "uint8"])
def test_layouts(isa, dtype, layout):
    imgs, ids = images(3, 3, 16, 36, dtype), torch.randint(4, (3, 4))
    expected = ops.gather_patches(imgs, ids, (8, 18))
    assert torch.equal(ops.gather_patches(layout(imgs), ids, (8, 18)), expected)
    for ids_layout in LAYOUTS.values():
        assert torch.equal(ops.gather_patches(imgs, ids_layout(ids), (8, 18)), expected)


@pytest.mark.parametrize("dtype", [F32, F16, U8], ids=["fp32", "fp16", "uint8"])
@pytest.mark.parametrize("dim", range(4))
def test_zero_strides(isa, dim, dtype):
    expanded, ids = images(2, 3, 16, 16, dtype).narrow(dim, 0, 1).expand(2, 3, 16, 16), torch.randint(4, (1, 3)).expand(2, 3)
    assert torch.equal(ops.gather_patches(expanded, ids, 8), ops.gather_patches(expanded.contiguous(), ids.contiguous(), 8))
    if dtype != U8:
        assert torch.equal(ops.gather_patches(expanded, ids, 8), gather_by_loops(expanded, ids, 8, 8))


def test_layouts_of_the_statistics(isa):
    imgs, ids = images(2, 3, 14, 10, U8), torch.randint(4, (2, 3))
    expected = ops.gather_patches(imgs, ids, (7, 5), MEAN, STD)
    for layout in (LAYOUTS["misaligned"], LAYOUTS["sliced"]):
        assert torch.equal(ops.gather_patches(imgs, ids, (7, 5), layout(MEAN), layout(STD)), expected)
    mean, std = torch.tensor(0.5), torch.tensor(0.25)
    expected = ops.gather_patches(imgs, ids, (7, 5), mean.repeat(3), std.repeat(3))
    assert torch.equal(ops.gather_patches(imgs, ids, (7, 5), mean.expand(3), std.expand(3)), expected)


@pytest.mark.parametrize(("N", "K"), [(0, 4), (0, 0), (3, 0)])
@pytest.mark.parametrize("dtype", [F32, U8], ids=["fp32", "uint8"])
def test_empty(each_backend, dtype, N, K):
    out = ops.gather_patches(images(N, 3, 8, 8, dtype), torch.zeros(N, K, dtype=torch.int64), 4)
    assert (out.shape, out.dtype) == ((N, K, 48), F32)


def test_other_dtypes_run_eagerly():
    imgs, ids = images(2, 3, 8, 8, torch.float64), torch.randint(4, (2, 3))
    assert_equal(ops.gather_patches(imgs, ids, 4), gather_by_loops(imgs, ids, 4, 4))


def test_gradient_of_images():
    imgs, ids = images(2, 2, 6, 4, torch.float64).requires_grad_(), torch.tensor([[0, 0, 3], [1, 5, 2]])  # a patch twice
    assert torch.autograd.gradcheck(lambda x: ops.gather_patches(x, ids, 2), (imgs,))
    single = imgs.detach().float().requires_grad_()
    (grad,) = torch.autograd.grad(ops.gather_patches(single, ids, 2).sum(), single)
    assert grad[0].tolist() == [[[2, 2, 0, 0]] * 2 + [[0, 0, 1, 1]] * 2 + [[0, 0, 0, 0]] * 2] * 2


def test_native_refuses_a_gradient_of_images(native):
    imgs, ids = images(1, 1, 4, 4).requires_grad_(), torch.tensor([[1]])
    with maefast.backend("native"):
        with pytest.raises(RuntimeError, match=r"gather_patches.*native.*no gradient for imgs"):
            ops.gather_patches(imgs, ids, 2)
        with torch.no_grad():
            assert torch.equal(ops.gather_patches(imgs, ids, 2), gather_by_loops(imgs, ids, 2, 2))


@pytest.mark.parametrize("dtype", [F32, U8], ids=["fp32", "uint8"])
def test_threads_do_not_matter(isa, dtype):
    imgs, ids = images(7, 3, 128, 128, dtype), torch.randint(64, (7, 41))
    statistics = (MEAN, STD) if dtype == U8 else ()
    assert_same_for_any_threads(lambda: {"patches": ops.gather_patches(imgs, ids, 16, *statistics)})


@pytest.mark.huge
def test_more_than_2_31_elements(native):
    N = 15_000
    single, ids = images(1, 3, 224, 224), torch.randint(196, (N, 1))
    imgs = single.expand(N, -1, -1, -1)
    assert imgs.numel() > 2**31
    assert torch.equal(ops.gather_patches(imgs, ids, 16), gather_by_loops(single, ids.T, 16, 16).reshape(N, 1, 768))


@pytest.mark.huge
def test_offsets_beyond_2_31(native):
    imgs = torch.zeros(15_000, 3, 224, 224, dtype=U8)  # untouched pages take no memory
    imgs[-1] = images(1, 3, 224, 224, U8)[0]
    ids = torch.randint(196, (1, 50))
    out = ops.gather_patches(imgs, ids.expand(15_000, -1)[:, :2], 16)
    assert out[-1].any()
    assert torch.equal(out[-1:], ops.gather_patches(imgs[-1:].clone(), ids[:, :2], 16))


def test_opcheck(native):
    for dtype, *statistics in ((F32, None, None), (U8, MEAN, STD)):
        for out in (BF16, F16):
            args = (images(2, 3, 4, 10, dtype), torch.randint(4, (2, 3)), 2, 5, *statistics, out)
            torch.library.opcheck(torch.ops.maefast.gather_patches_fwd.default, args)
