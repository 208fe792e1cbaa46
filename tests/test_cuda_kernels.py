"""The CUDA kernels and entries of the MAE ops on the CPU, over tests/cuda_emulator.

Their machine code is tests/test_cuda_sources.py's, the real thing tests/gpu's.
"""

import ctypes

import pytest
import torch
from emulated import compiled, cuda, linked, needs_emulator
from support import (
    IMAGE_LAYOUTS,
    LAYOUTS,
    assert_once_differentiable,
    at_the_edge,
    check_op,
    lay_out,
    permutations,
    removed_mask,
    widened,
)
from torch import Tensor

import maefast
from maefast import dispatch, ops

OPS = ("random_masking", "gather_patches", "unshuffle", "masked_mse")

F32, BF16, F16, U8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8
FLOATS = {"fp32": F32, "bf16": BF16, "fp16": F16}
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

pytestmark = [needs_emulator, pytest.mark.usefixtures("emulated", "poisoned")]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("emulator")
    sources = linked(folder)
    return compiled(folder, [sources / f"{op}.cu" for op in OPS])


@pytest.fixture
def emulated(emulator, monkeypatch) -> None:
    """The native backend of the public ops is the emulated one."""
    monkeypatch.setattr(dispatch, "ops_of", lambda backend: cuda)


@pytest.fixture(params=[False, True], ids=["in_order", "reversed"])
def order(request, emulator):
    """Threads and blocks in either order: a missing barrier shows in one of them."""
    emulator.emulator_reverse(request.param)
    yield
    emulator.emulator_reverse(False)


def images(N: int, C: int, H: int, W: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randint(256, (N, C, H, W), dtype=U8) if dtype == U8 else torch.randn(N, C, H, W).to(dtype)


def assert_equal(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("L", [1, 4, 7, 196, 301])
def test_random_masking(L):
    noise = torch.rand(3, L)
    noise[1] = (noise[1] * 4).floor() - 2  # ties, and both zeros
    noise[1, ::3] *= -1
    noise[2, ::2] = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf])[torch.arange(len(noise[2, ::2])) % 4]
    for len_keep in {0, L // 4, L}:
        with maefast.backend("native"):
            assert_equal(ops.random_masking(noise, len_keep), ops.random_masking_ref(noise, len_keep))


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("out", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16, U8], ids=["fp32", "bf16", "fp16", "uint8"])
@pytest.mark.parametrize("patch", [(16, 16), (14, 14), (2, 8), (3, 5), (1, 48)], ids=str)
def test_gather_patches(patch, dtype, out):
    imgs, ids = images(3, 3, 2 * patch[0], 3 * patch[1], dtype), torch.randint(6, (3, 5))
    statistics = (MEAN, STD) if dtype == U8 else (None, None)

    def op(imgs: Tensor) -> Tensor:
        wide = imgs.dtype == torch.float64
        return ops.gather_patches(imgs, ids, patch, *((None, None) if wide else statistics), dtype=imgs.dtype if wide else out)

    check_op(op, [{"imgs": imgs}], lambda inputs: {"imgs": widened(inputs["imgs"], *statistics)})
    if dtype == out:
        with maefast.backend("native"):
            assert torch.equal(op(imgs), ops.gather_patches_ref(imgs, ids, patch, None, None, out))


def every_second(t: Tensor) -> Tensor:
    """Return a copy with values two apart and every row aligned."""
    return t.new_zeros(*t.shape, 2)[..., 0].copy_(t)


@pytest.mark.parametrize("layout", [*IMAGE_LAYOUTS.values(), every_second], ids=[*IMAGE_LAYOUTS, "every_second"])
@pytest.mark.parametrize("dtype", [F32, U8], ids=["fp32", "uint8"])
@pytest.mark.parametrize("patch", [16, 6])
def test_image_layouts(layout, dtype, patch):
    imgs, ids = images(2, 3, 2 * patch, 3 * patch, dtype), torch.randint(6, (2, 4))
    laid = lay_out(layout, imgs)
    mask, pred = removed_mask(2, 6, 2), torch.randn(2, 4, 3 * patch**2)
    with maefast.backend("native"):
        assert torch.equal(ops.gather_patches(laid, ids, patch), ops.gather_patches(imgs, ids, patch))
        assert torch.equal(ops.masked_mse(pred, laid, mask, patch, True), ops.masked_mse(pred, imgs, mask, patch, True))


def test_gather_patches_out_of_range():
    """Nothing is checked on a GPU: pixels of zero."""
    imgs = images(2, 3, 8, 8)
    out = cuda.gather_patches_fwd(imgs, torch.tensor([[-1, 3, 4], [2**40, 0, -(2**63)]]), 4, 4, None, None, F32)
    inside = torch.tensor([[False, True, False], [False, True, False]])
    assert not out[~inside].any()
    assert torch.equal(out[inside], torch.stack([imgs[0, :, 4:, 4:].flatten(), imgs[1, :, :4, :4].flatten()]))


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize(("N", "len_keep"), [(1, 37), (3, 0), (3, 48), (2100, 3)])
def test_mask_patches(N, len_keep):
    """One launch gives what the two ops give; a sample is one block or many."""
    imgs, noise = images(N, 1, 12, 16), torch.rand(N, 48)
    ids_keep, ids_restore, mask = ops.random_masking_ref(noise, len_keep)
    patches = ops.gather_patches_ref(imgs, ids_keep, (2, 2), None, None, BF16)
    got = cuda.mask_patches_fwd(imgs, noise, len_keep, 2, 2, None, None, BF16)
    assert_equal(got, (patches, ids_keep, ids_restore, mask))


def test_the_fake_of_mask_patches():
    args = (torch.rand(2, 6), 2, 4, 4, None, None, BF16)
    real = cuda.mask_patches_fwd(images(2, 3, 8, 12, U8), *args)
    fake = torch.ops.maefast.mask_patches_fwd(torch.empty(2, 3, 8, 12, dtype=U8, device="meta"), args[0].to("meta"), *args[1:])
    assert [(t.shape, t.dtype) for t in real] == [(t.shape, t.dtype) for t in fake]


UNSHUFFLE_DTYPES = {  # x, mask_token and pos_embed
    "fp32": (F32, F32),
    "bf16": (BF16, BF16),
    "fp16": (F16, F16),
    "autocast": (BF16, F32),
    "fp16_fp32": (F16, F32),
}


def check_unshuffle(N, L, K, D, dtypes=UNSHUFFLE_DTYPES["fp32"], layout=lambda t: t):
    ids_restore = permutations(N, L)
    tensors = {
        "x": torch.randn(N, 1 + K, D).to(dtypes[0]),
        "mask_token": torch.randn(1, 1, D).to(dtypes[1]),
        "pos_embed": torch.randn(1, 1 + L, D).to(dtypes[1]),
    }
    inputs = {name: t.requires_grad_() for name, t in tensors.items()}
    check_op(
        lambda x, mask_token, pos_embed: ops.unshuffle(x, ids_restore, mask_token, pos_embed),
        [inputs],
        lambda inputs: {name: t.double() for name, t in inputs.items()},
        dy=torch.randn_like,
        layout=lambda inputs: {name: lay_out(layout, t) for name, t in inputs.items()},
    )


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("dtypes", UNSHUFFLE_DTYPES.values(), ids=UNSHUFFLE_DTYPES)
@pytest.mark.parametrize(("N", "L", "K", "D"), [(2, 5, 2, 1), (19, 6, 3, 63), (3, 49, 12, 520), (1, 196, 49, 768), (2, 3, 0, 8)])
def test_unshuffle(N, L, K, D, dtypes):
    check_unshuffle(N, L, K, D, dtypes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("D", [8, 7])
def test_unshuffle_layouts(layout, D):
    check_unshuffle(3, 6, 2, D, layout=LAYOUTS[layout])


MSE_DTYPES = {  # pred, imgs
    "fp32": (F32, F32),
    "bf16": (BF16, BF16),
    "fp16": (F16, F16),
    "autocast": (BF16, F32),
    "fp32_uint8": (F32, U8),
    "bf16_uint8": (BF16, U8),
}


def check_masked_mse(
    patch, C=3, N=2, grid=(3, 4), dtypes=MSE_DTYPES["fp32"], mask=None, norm_pix=True, compact=False, cases=4, **more
):
    """Several cases: a loss is a single value, and eager's may be exact by chance."""
    L, P = grid[0] * grid[1], C * patch[0] * patch[1]
    mask = removed_mask(N, L, L // 3) if mask is None else mask
    statistics = (torch.rand(C), torch.rand(C) + 0.2) if dtypes[1] == U8 else (None, None)
    rows = int((mask[0] != 0).sum()) if compact else L

    def inputs() -> dict[str, Tensor]:
        pred = torch.randn(N, rows, P).to(dtypes[0]).requires_grad_()
        return {"pred": pred, "imgs": images(N, C, grid[0] * patch[0], grid[1] * patch[1], dtypes[1])}

    def op(pred: Tensor, imgs: Tensor) -> Tensor:
        return ops.masked_mse(pred, imgs, mask, patch, norm_pix, *(statistics if imgs.dtype == U8 else (None, None)))

    def exact(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"pred": inputs["pred"].double(), "imgs": widened(inputs["imgs"], *statistics)}

    check_op(op, [inputs() for _ in range(cases)], exact, dy=lambda loss: torch.full_like(loss, 0.37), **more)


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("compact", [False, True], ids=["all", "removed"])
@pytest.mark.parametrize("norm_pix", [False, True], ids=["raw", "norm"])
@pytest.mark.parametrize("dtypes", MSE_DTYPES.values(), ids=MSE_DTYPES)
@pytest.mark.parametrize("patch", [(16, 16), (7, 5)], ids=str)
def test_masked_mse(patch, dtypes, norm_pix, compact):
    check_masked_mse(patch, dtypes=dtypes, norm_pix=norm_pix, compact=compact)


@pytest.mark.parametrize(("patch", "C"), [((1, 2), 1), ((2, 2), 13), ((32, 32), 3), ((64, 64), 1), ((60, 60), 3)], ids=str)
def test_masked_mse_sizes(patch, C):
    """From two values in a patch to one patch in all of the shared memory."""
    check_masked_mse(patch, C=C, N=1, grid=(1, 5), compact=True)


@pytest.mark.parametrize("compact", [False, True])
def test_masked_mse_many_patches_a_warp(compact):
    mask = (torch.arange(4 * 64 * 65).reshape(4, -1) % 65 // 2 == 1).float()  # two neighbours: of one warp or of two
    check_masked_mse((1, 2), N=4, grid=(64, 65), mask=mask, compact=compact, cases=1)


def test_masked_mse_weights():
    check_masked_mse((4, 4), mask=torch.rand(2, 12) * removed_mask(2, 12, 4) * 7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masked_mse_pred_layouts(layout):
    def laid(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return inputs | {"pred": lay_out(LAYOUTS[layout], inputs["pred"])}

    check_masked_mse((4, 2), layout=laid)


def test_masked_mse_is_silent_about_patches_without_weight():
    imgs, mask, pred = images(2, 3, 8, 8), torch.tensor([[0.0, 1, 1, 0], [1, 0, 0, 1]]), torch.randn(2, 4, 48)
    expected = ops.masked_mse_ref(pred, imgs, mask, (4, 4), True, None, None)
    pred[mask == 0] = torch.nan
    pred.requires_grad_()
    with maefast.backend("native"):
        loss = ops.masked_mse(pred, imgs, mask, 4, True)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert not pred.grad[mask == 0].any()


def test_masked_mse_rows_of_no_patch():
    """A mask that removes fewer than M, which a GPU does not check: the other rows get zeros."""
    imgs, mask, pred = images(1, 1, 4, 8), torch.tensor([[0.0, 1, 0, 1, 0, 0, 0, 0]]), torch.randn(1, 5, 4)
    dpred = cuda.masked_mse_bwd(torch.tensor(1.0), pred, imgs, mask, 2, 2, False, None, None)
    alone = cuda.masked_mse_bwd(torch.tensor(1.0), pred[:, :2], imgs, mask, 2, 2, False, None, None)
    assert torch.equal(dpred, torch.cat([alone, torch.zeros(1, 3, 4)], dim=1))


def test_backward_twice():
    with maefast.backend("native"):
        pred, mask = torch.randn(2, 4, 48, requires_grad=True), removed_mask(2, 4, 1)
        imgs, ids_restore = images(2, 3, 8, 8), permutations(2, 4)
        assert_once_differentiable(lambda pred: ops.masked_mse(pred, imgs, mask, 4, True), {"pred": pred})
        tokens = {"x": torch.randn(2, 3, 8), "mask_token": torch.randn(1, 1, 8), "pos_embed": torch.randn(1, 5, 8)}
        leaves = {name: t.requires_grad_() for name, t in tokens.items()}
        assert_once_differentiable(lambda **t: ops.unshuffle(ids_restore=ids_restore, **t), leaves)


def test_no_samples():
    imgs, empty = images(0, 3, 8, 8), torch.empty(0, 4)
    ids_keep, ids_restore, mask = cuda.random_masking_fwd(empty, 1)
    assert [t.shape for t in (ids_keep, ids_restore, mask)] == [(0, 1), (0, 4), (0, 4)]
    assert cuda.gather_patches_fwd(imgs, ids_keep, 4, 4, None, None, F32).shape == (0, 1, 48)
    assert [t.shape for t in cuda.mask_patches_fwd(imgs, empty, 1, 4, 4, None, None, F32)] == [(0, 1, 48), (0, 1), (0, 4), (0, 4)]
    assert cuda.unshuffle_fwd(torch.empty(0, 2, 8), ids_restore, torch.ones(1, 1, 8), torch.ones(1, 5, 8)).shape == (0, 5, 8)
    dx, dmask_token = cuda.unshuffle_bwd(torch.empty(0, 5, 8), ids_restore, 1, F32)
    assert dx.shape == (0, 2, 8)
    assert not dmask_token.any()
    pred = torch.empty(0, 4, 48)
    assert cuda.masked_mse_fwd(pred, imgs, empty, 4, 4, True, None, None).isnan()
    assert cuda.masked_mse_bwd(torch.tensor(1.0), pred, imgs, empty, 4, 4, True, None, None).shape == pred.shape


@pytest.mark.parametrize("end", [True, False], ids=["behind", "before"])
@pytest.mark.parametrize("dtype", [F32, U8], ids=["fp32", "uint8"])
@pytest.mark.parametrize("patch", [16, 2])
def test_nothing_is_read_out_of_bounds(patch, dtype, end):
    def edge(t: Tensor) -> Tensor:
        return at_the_edge(t, end)

    imgs, noise, ids = edge(images(2, 3, 2 * patch, 3 * patch, dtype)), edge(torch.rand(2, 6)), edge(torch.randint(6, (2, 4)))
    cuda.mask_patches_fwd(imgs, noise, 2, patch, patch, None, None, BF16)
    cuda.gather_patches_fwd(imgs, ids, patch, patch, None, None, F32)
    mask, pred = edge(removed_mask(2, 6, 2)), edge(torch.randn(2, 4, 3 * patch**2))
    cuda.masked_mse_fwd(pred, imgs, mask, patch, patch, True, None, None)
    cuda.masked_mse_bwd(edge(torch.tensor([0.5])), pred, imgs, mask, patch, patch, True, None, None)
    for D in (16, 9):
        x, ids_restore, dy = edge(torch.randn(2, 3, D)), edge(permutations(2, 6)), edge(torch.randn(2, 7, D))
        cuda.unshuffle_fwd(x, ids_restore, edge(torch.randn(1, 1, D)), edge(torch.randn(1, 7, D)))
        cuda.unshuffle_bwd(dy, ids_restore, 2, BF16)


def test_what_entries_refuse():
    imgs, noise, ids = images(2, 3, 8, 8), torch.rand(2, 4), permutations(2, 4)
    x, token, positions = torch.randn(2, 2, 8), torch.randn(1, 1, 8), torch.randn(1, 5, 8)
    pred = torch.randn(2, 4, 48)
    for call, message in (
        (lambda: cuda.random_masking_fwd(noise.double(), 1), r"noise must be \(N, L\) float32"),
        (lambda: cuda.random_masking_fwd(noise, 5), r"len_keep must be in \[0, 4\], it is 5"),
        (lambda: cuda.random_masking_fwd(torch.rand(1, 2049), 1), "up to 2048 patches, noise has 2049"),
        (lambda: cuda.gather_patches_fwd(imgs, ids.int(), 4, 4, None, None, F32), "ids must be"),
        (lambda: cuda.gather_patches_fwd(imgs, ids, 3, 4, None, None, F32), "must be a multiple of the patch"),
        (lambda: cuda.gather_patches_fwd(imgs, ids, 4, 4, None, None, torch.float64), "dtype must be float32"),
        (lambda: cuda.gather_patches_fwd(imgs.double(), ids, 4, 4, None, None, F32), "imgs must be float32"),
        (lambda: cuda.gather_patches_fwd(imgs, ids, 4, 4, MEAN, STD, F32), "are for uint8 images"),
        (lambda: cuda.mask_patches_fwd(imgs, noise[:1], 1, 4, 4, None, None, F32), "noise must be"),
        (lambda: cuda.unshuffle_fwd(x, ids[:1], token, positions), "with the N of ids_restore"),
        (lambda: cuda.unshuffle_fwd(x.half(), ids, token.bfloat16(), positions), "one dtype, float32 or that of x"),
        (lambda: cuda.unshuffle_fwd(x, ids, token, positions[:, 1:]), r"pos_embed \(1, 1\+L, D\)"),
        (lambda: cuda.unshuffle_bwd(positions, ids, 1, F32), "dy must be"),
        (lambda: cuda.masked_mse_fwd(pred, imgs, noise[:, 1:], 4, 4, True, None, None), "mask must be"),
        (lambda: cuda.masked_mse_fwd(pred[..., 1:], imgs, noise, 4, 4, True, None, None), r"pred must be \(N, M, 48\)"),
        (lambda: cuda.masked_mse_bwd(noise, pred, imgs, noise, 4, 4, True, None, None), "dloss must be"),
        (
            lambda: cuda.masked_mse_fwd(torch.empty(1, 1, 12288), images(1, 3, 64, 64), noise[:1, :1], 64, 64, True, None, None),
            "12272",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
