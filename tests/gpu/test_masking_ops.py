"""The masking ops on a GPU, by each backend, and the launch that masks and gathers at once."""

import pytest
import torch
from support import assert_equal, check_op, widened
from torch import Tensor

import maefast
from maefast import _library, kernels, ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BACKENDS = [
    pytest.param("native", marks=pytest.mark.skipif(not _library.HAS_CUDA, reason="needs a build with CUDA kernels")),
    pytest.param("triton", marks=pytest.mark.skipif(not kernels.HAS_TRITON, reason="needs Triton")),
]
F32, BF16, F16, U8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8
N = 33


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    torch.cuda.manual_seed(0)
    return request.param


@pytest.fixture(params=[(224, 16), (224, 14), (96, 8)], ids=str)
def size(request) -> tuple[int, int]:
    return request.param


def images(H: int, dtype: torch.dtype) -> Tensor:
    shape = (N, 3, H, H)
    return torch.randint(256, shape, dtype=U8, device="cuda") if dtype == U8 else torch.randn(shape, device="cuda").to(dtype)


def statistics_for(imgs: Tensor) -> tuple[Tensor | None, Tensor | None]:
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device="cuda")
    return (mean, std) if imgs.dtype == U8 else (None, None)


def noise(L: int) -> Tensor:
    values = torch.rand(N, L, device="cuda")
    values[0] = (values[0] * 5).floor()
    values[1, ::3] = torch.nan
    return values


def masks(L: int, len_keep: int) -> tuple[Tensor, Tensor, Tensor]:
    return ops.random_masking_ref(torch.rand(N, L, device="cuda"), len_keep)


@pytest.mark.parametrize("L", [1, 49, 196, 256, 1000])
def test_random_masking(backend, L):
    values = noise(L) if L > 1 else torch.rand(N, 1, device="cuda")
    with maefast.backend(backend):
        assert_equal(ops.random_masking(values, L // 4), ops.random_masking_ref(values, L // 4))


@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, BF16), (U8, BF16), (U8, F16), (BF16, BF16)], ids=str)
def test_gather_patches(backend, size, dtypes):
    (H, p), imgs = size, images(size[0], dtypes[0])
    ids = masks((H // p) ** 2, (H // p) ** 2 // 4)[0]
    statistics = statistics_for(imgs)

    def op(imgs: Tensor) -> Tensor:
        exact = imgs.dtype == torch.float64
        return ops.gather_patches(imgs, ids, p, *(() if exact else statistics), dtype=imgs.dtype if exact else dtypes[1])

    check_op(op, [{"imgs": imgs}], lambda inputs: {"imgs": widened(inputs["imgs"], *statistics)}, tested=backend)


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (F16, F16)], ids=str)
@pytest.mark.parametrize(("L", "D"), [(196, 512), (256, 512), (49, 63)])
def test_unshuffle(backend, L, D, dtypes):
    ids_restore = masks(L, L // 4)[1]
    shapes = {"x": (N, 1 + L // 4, D), "mask_token": (1, 1, D), "pos_embed": (1, 1 + L, D)}
    inputs = {name: torch.randn(shape, device="cuda").to(dtypes[name != "x"]).requires_grad_() for name, shape in shapes.items()}
    check_op(
        lambda **tensors: ops.unshuffle(ids_restore=ids_restore, **tensors),
        [inputs],
        lambda inputs: {name: t.double() for name, t in inputs.items()},
        dy=torch.randn_like,
        tested=backend,
    )


@pytest.mark.parametrize("compact", [False, True], ids=["all", "removed"])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (BF16, U8), (F16, F16)], ids=str)
def test_masked_mse(backend, size, dtypes, compact):
    (H, p), imgs = size, images(size[0], dtypes[1])
    L = (H // p) ** 2
    mask = masks(L, L // 4)[2]
    statistics = statistics_for(imgs)
    pred = torch.randn(N, L - L // 4 if compact else L, 3 * p * p, device="cuda").to(dtypes[0]).requires_grad_()

    def op(pred: Tensor, imgs: Tensor) -> Tensor:
        return ops.masked_mse(pred, imgs, mask, p, True, *((None, None) if imgs.dtype == torch.float64 else statistics))

    def exact(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"pred": inputs["pred"].double(), "imgs": widened(inputs["imgs"], *statistics)}

    check_op(op, [{"pred": pred, "imgs": imgs}], exact, dy=lambda loss: torch.full_like(loss, 0.37), tested=backend)


def test_deterministic(backend):
    ids_restore, mask = masks(196, 49)[1:]
    x, token = (torch.randn(shape, device="cuda", requires_grad=True) for shape in ((N, 50, 512), (1, 1, 512)))
    pred, positions = torch.randn(N, 196, 768, device="cuda", requires_grad=True), torch.randn(1, 197, 512, device="cuda")
    imgs = images(224, F32)

    def run() -> tuple[Tensor, ...]:
        with maefast.backend(backend):
            y = ops.unshuffle(x, ids_restore, token, positions)
            loss = ops.masked_mse(pred, imgs, mask, 16, True)
            return y, loss, *torch.autograd.grad(y.sum() + loss, (x, token, pred))

    assert_equal(run(), run())


def test_graph(backend):
    """Captured and replayed with other inputs: what a launch outside gives."""
    imgs, values = images(224, F32), torch.rand(N, 196, device="cuda")
    pred, token, positions = (torch.randn(s, device="cuda") for s in ((N, 147, 768), (1, 1, 512), (1, 197, 512)))
    x = torch.randn(N, 50, 512, device="cuda")

    def run() -> tuple[Tensor, ...]:
        with maefast.backend(backend), torch.no_grad():
            ids_keep, ids_restore, mask = ops.random_masking(values, 49)
            patches, y = ops.gather_patches(imgs, ids_keep, 16), ops.unshuffle(x, ids_restore, token, positions)
            return ids_keep, ids_restore, mask, patches, y, ops.masked_mse(pred, imgs, mask, 16, True)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    values.copy_(torch.rand_like(values))
    imgs.copy_(torch.randn_like(imgs))
    graph.replay()
    assert_equal(captured, run())


@pytest.mark.skipif(not _library.HAS_CUDA, reason="needs a build with CUDA kernels")
@pytest.mark.parametrize("dtype", [F32, U8], ids=["fp32", "uint8"])
def test_one_launch_for_masking_and_patches(size, dtype):
    (H, p), imgs = size, images(size[0], dtype)
    L = (H // p) ** 2
    values, statistics = noise(L), statistics_for(imgs)
    patches, *masking = torch.ops.maefast.mask_patches_fwd(imgs, values, L // 4, p, p, *statistics, BF16)
    expected = ops.random_masking_ref(values, L // 4)
    assert_equal(tuple(masking), expected)
    with maefast.backend("native"):
        assert torch.equal(patches, ops.gather_patches(imgs, expected[0], p, *statistics, dtype=BF16))


@pytest.mark.skipif(not _library.HAS_CUDA, reason="needs a build with CUDA kernels")
def test_opcheck():
    imgs, values = images(32, F32), torch.rand(N, 4, device="cuda")
    ids_keep, ids_restore, mask = ops.random_masking_ref(values, 2)
    mse = (torch.randn(N, 4, 768, device="cuda"), imgs, mask, 16, 16, True, None, None)
    tokens = [torch.randn(shape, device="cuda") for shape in ((N, 3, 8), (1, 1, 8), (1, 5, 8))]
    for name, args in (
        ("random_masking_fwd", (values, 2)),
        ("gather_patches_fwd", (imgs, ids_keep, 16, 16, None, None, BF16)),
        ("mask_patches_fwd", (imgs, values, 2, 16, 16, None, None, BF16)),
        ("unshuffle_fwd", (tokens[0], ids_restore, *tokens[1:])),
        ("unshuffle_bwd", (torch.randn(N, 5, 8, device="cuda"), ids_restore, 2, F16)),
        ("masked_mse_fwd", mse),
        ("masked_mse_bwd", (torch.ones((), device="cuda"), *mse)),
    ):
        torch.library.opcheck(getattr(torch.ops.maefast, name).default, args)
