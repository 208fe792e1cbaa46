import pytest
import torch
from support import assert_equal

import maefast
from maefast import ops

MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])


def make(N: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    if dtype == torch.uint8:
        pixels = {"imgs": torch.randint(256, (N, 3, 12, 8), dtype=dtype), "mean": MEAN, "std": STD}
    else:
        pixels = {"imgs": torch.randn(N, 3, 12, 8).to(dtype)}
    return pixels | {"noise": torch.rand(N, 6), "len_keep": 2, "patch_size": (4, 4)}


def test_by_hand(each_backend):
    imgs = torch.arange(16.0).view(1, 1, 4, 4)
    got = ops.mask_patches(imgs, torch.tensor([[0.4, 0.1, 0.3, 0.2]]), 2, 2)  # patches, ids_keep, ids_restore, mask
    patches = [[[2, 3, 6, 7], [10, 11, 14, 15]]]
    assert [t.tolist() for t in got] == [patches, [[1, 3]], [[3, 0, 2, 1]], [[1, 0, 1, 0]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("out", [None, torch.float32, torch.bfloat16], ids=str)
def test_it_is_masking_then_gathering(each_backend, dtype, out):
    inputs = make(dtype=dtype)
    got = ops.mask_patches(**inputs, dtype=out)
    masking = ops.random_masking(inputs["noise"], 2)
    patches = ops.gather_patches(inputs["imgs"], masking[0], 4, inputs.get("mean"), inputs.get("std"), out)
    assert_equal(got, (patches, *masking))


def test_reference():
    inputs = make()
    expected = ops.mask_patches_ref(**inputs, mean=None, std=None, dtype=torch.float32)
    with maefast.backend("eager"):
        assert_equal(ops.mask_patches(**inputs), expected)


def test_gradients_for_the_image():
    inputs = make()
    inputs["imgs"].requires_grad_()
    patches, ids_keep, _, _ = ops.mask_patches(**inputs)
    (dimgs,) = torch.autograd.grad(patches.sum(), inputs["imgs"])
    kept = torch.zeros(3, 6).scatter(1, ids_keep, 1).view(3, 1, 3, 1, 2, 1).expand(3, 3, 3, 4, 2, 4)
    assert torch.equal(dimgs, kept.reshape(3, 3, 12, 8))


@pytest.mark.parametrize(("N", "len_keep"), [(0, 2), (3, 0), (3, 6)])
def test_nothing_or_everything_is_kept(each_backend, N, len_keep):
    *got, mask = ops.mask_patches(**make(N) | {"len_keep": len_keep})
    assert [t.shape for t in got] == [(N, len_keep, 48), (N, len_keep), (N, 6)]
    assert mask.sum() == N * (6 - len_keep)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"noise": torch.rand(3, 5)}, ValueError, r"noise must be \(N, L\) = \(3, 6\); its shape is \(3, 5\)"),
        ({"noise": torch.rand(2, 6)}, ValueError, r"noise must be \(N, L\) = \(3, 6\); its shape is \(2, 6\)"),
        ({"noise": torch.rand(3, 6).double()}, TypeError, "noise must be float32; it is float64"),
        ({"noise": torch.rand(3, 6, device="meta")}, ValueError, "noise must be on the device of imgs, cpu; it is on meta"),
        ({"len_keep": 7}, ValueError, r"len_keep must be in \[0, 6\]; it is 7"),
        ({"patch_size": 5}, ValueError, "multiples of the patch, 5 x 5"),
        ({"imgs": torch.ones(3, 3, 12, 8, dtype=torch.int64)}, TypeError, "imgs must be floating-point or uint8"),
        ({"mean": MEAN}, ValueError, "mean and std must be given together"),
        ({"dtype": torch.int64}, TypeError, "dtype must be floating-point; it is int64"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input(each_backend, changed, error, message):
    with pytest.raises(error, match=message):
        ops.mask_patches(**make() | changed)


def test_under_compile(fresh_dynamo):
    inputs = make()
    compiled = torch.compile(ops.mask_patches, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(**inputs), ops.mask_patches(**inputs))


def test_fake():
    """The kernel is a GPU's; its fake gives the shapes and dtypes of the reference anywhere."""
    imgs, noise = torch.empty(3, 3, 12, 8, device="meta"), torch.empty(3, 6, device="meta")
    got = torch.ops.maefast.mask_patches_fwd(imgs, noise, 2, 4, 4, None, None, torch.bfloat16)
    expected = ops.mask_patches_ref(torch.ones(3, 3, 12, 8), torch.rand(3, 6), 2, (4, 4), None, None, torch.bfloat16)
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in expected]
