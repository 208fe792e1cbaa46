import math
from functools import partial

import pytest
import torch
from support import (
    IMAGE_LAYOUTS,
    LAYOUTS,
    assert_once_differentiable,
    assert_same_for_any_threads,
    check_op,
    forward_backward,
    lay_out,
    permutations,
    removed_mask,
    widened,
)
from torch import Tensor

import maefast
from maefast import ops
from maefast.reference import ReferenceMAE

pytestmark = pytest.mark.usefixtures("poisoned")

F32, BF16, F16, U8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8
DTYPES = {  # pred, imgs
    "fp32": (F32, F32),
    "bf16": (BF16, BF16),
    "fp16": (F16, F16),
    "autocast": (BF16, F32),
    "fp32_bf16": (F32, BF16),
    "bf16_fp16": (BF16, F16),
    "fp32_uint8": (F32, U8),
    "bf16_uint8": (BF16, U8),
    "fp16_uint8": (F16, U8),
}
FLOATS, AUTOCAST, BYTES = DTYPES["fp32"], DTYPES["autocast"], DTYPES["fp32_uint8"]
PATCHES = [(1, 2), (2, 2), (7, 5), (14, 14), (16, 16)]
WEIGHTS = {
    "mask": lambda N, L: removed_mask(N, L, L // 3),
    "ones": torch.ones,
    "any": lambda N, L: torch.rand(N, L) * removed_mask(N, L, L // 3) * 7 + 0.01,
    "one_patch": lambda N, L: torch.eye(N * L)[3].reshape(N, L),
}


def make(patch, C=3, N=2, grid=(3, 4), dtypes=FLOATS, weights="mask", compact=False) -> dict[str, Tensor]:
    L, P = grid[0] * grid[1], C * patch[0] * patch[1]
    mask = WEIGHTS[weights](N, L)
    shape = (N, C, grid[0] * patch[0], grid[1] * patch[1])
    pred = torch.randn(N, int(mask[0].sum()) if compact else L, P).to(dtypes[0]).requires_grad_()
    imgs = torch.randint(256, shape, dtype=U8) if dtypes[1] == U8 else torch.randn(shape).to(dtypes[1])
    return {"pred": pred, "imgs": imgs, "mask": mask}


def check(cases, patch, norm_pix=True, layout=lambda inputs: inputs):
    """uint8 images with statistics; the incoming gradient is not 1."""
    C = cases[0]["imgs"].shape[1]
    statistics = (torch.rand(C), torch.rand(C) + 0.2) if cases[0]["imgs"].dtype == U8 else (None, None)

    def op(pred: Tensor, imgs: Tensor, mask: Tensor) -> Tensor:
        return ops.masked_mse(pred, imgs, mask, patch, norm_pix, *(statistics if imgs.dtype == U8 else (None, None)))

    def exact(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return inputs | {"pred": inputs["pred"].double(), "imgs": widened(inputs["imgs"], *statistics)}

    check_op(op, cases, exact, dy=lambda loss: torch.full_like(loss, 0.37), layout=layout)


def test_by_hand(each_backend):
    imgs = torch.tensor([[1.0, 2.0, 9.0, 9.0], [3.0, 6.0, 9.0, 9.0]]).reshape(1, 1, 2, 4)  # patch 0 is 1 2 3 6, patch 1 is 9
    pred = torch.zeros(1, 2, 4, requires_grad=True)
    mask = torch.tensor([[1.0, 3.0]])
    loss = ops.masked_mse(pred, imgs, mask, 2, False)
    assert loss.item() == (50 / 4 + 3 * 81) / 4
    loss.backward()
    assert pred.grad.tolist() == [[[-1 / 8, -2 / 8, -3 / 8, -6 / 8], [-27 / 8] * 4]]
    # mean 3, unbiased variance 14/3: squares of the target sum to 3; the constant patch has the target 0
    normalised = ops.masked_mse(pred.detach() + 2, imgs, mask, 2, True).item()
    assert math.isclose(normalised, ((3 + 4 * 4) / 4 + 3 * 4) / 4, rel_tol=1e-6)


def test_channels_are_fastest(each_backend):
    imgs = torch.arange(2 * 2 * 4, dtype=F32).reshape(1, 2, 2, 4)  # channel 1 is channel 0 + 8
    pred = torch.tensor([[[0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]]], dtype=F32)
    assert ops.masked_mse(pred, imgs, torch.ones(1, 2), 2, False).item() == 0
    assert ops.masked_mse(pred[:, 1:], imgs, torch.tensor([[0.0, 1.0]]), 2, False).item() == 0


@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm_pix", "pixels"])
def test_reference_is_the_loss_of_the_reference_model(norm_pix):
    model = ReferenceMAE((12, 15), (4, 5), 3, 4, 0, 1, 4, 0, 1, norm_pix_loss=norm_pix).double()
    inputs = make((4, 5), grid=(3, 3))
    inputs |= {"pred": inputs["pred"].detach().double(), "imgs": inputs["imgs"].double()}
    expected = model.forward_loss(inputs["imgs"], inputs["pred"], inputs["mask"])
    torch.testing.assert_close(ops.masked_mse(**inputs, patch_size=(4, 5), norm_pix=norm_pix), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm_pix", "pixels"])
@pytest.mark.parametrize("compact", [True, False], ids=["compact", "all_rows"])
def test_reference_gradients(norm_pix, compact):
    inputs = make((2, 1), C=2, grid=(2, 2), compact=compact)
    pred, imgs = (inputs[name].detach().double().requires_grad_() for name in ("pred", "imgs"))
    assert torch.autograd.gradcheck(lambda p, i: ops.masked_mse(p, i, inputs["mask"], (2, 1), norm_pix), (pred, imgs))


@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm_pix", "pixels"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_patches(isa, patch, dtypes, norm_pix):
    check([make(patch, dtypes=dtypes) for _ in range(16)], patch, norm_pix)


@pytest.mark.parametrize("C", [1, 3, 4, 13])
@pytest.mark.parametrize("dtypes", [FLOATS, BYTES, AUTOCAST], ids=["fp32", "uint8", "autocast"])
def test_channels(isa, C, dtypes):
    check([make((7, 5), C=C, dtypes=dtypes) for _ in range(16)], (7, 5))


def test_patches_of_one_value(isa):
    check([make((1, 1), C=1, grid=(13, 17)) for _ in range(16)], (1, 1), norm_pix=False)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtypes", [FLOATS, AUTOCAST], ids=["fp32", "autocast"])
def test_weights(isa, weights, dtypes):
    check([make((4, 4), N=3, dtypes=dtypes, weights=weights) for _ in range(16)], (4, 4))


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_removed_rows_alone(isa, dtypes):
    check([make((7, 5), N=3, dtypes=dtypes, compact=True) for _ in range(16)], (7, 5))


@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm_pix", "pixels"])
def test_removed_rows_alone_are_the_rows_of_all(native, norm_pix):
    inputs = make((4, 4), N=3)
    removed = inputs["mask"].nonzero()[:, 1].reshape(3, -1)
    index = removed[..., None].expand(-1, -1, 48)
    compact = inputs | {"pred": inputs["pred"].detach().gather(1, index).requires_grad_()}
    whole, part = (forward_backward(partial(ops.masked_mse, patch_size=4, norm_pix=norm_pix), x, None) for x in (inputs, compact))
    assert torch.equal(part["out"], whole["out"])
    assert torch.equal(part["d_pred"], whole["d_pred"].gather(1, index))
    assert (whole["d_pred"][inputs["mask"] == 0] == 0).all()


def test_weights_scale_patches(each_backend):
    """Any weights: the weighted mean of the losses of single patches."""
    inputs = make((4, 4), N=1, grid=(2, 2))
    inputs["mask"] = torch.tensor([[0.5, -2.0, 3.0, 4.5]])
    single = [ops.masked_mse(**inputs | {"mask": torch.eye(4)[i : i + 1]}, patch_size=4, norm_pix=True).item() for i in range(4)]
    expected = sum(w * loss for w, loss in zip(inputs["mask"][0].tolist(), single, strict=True)) / 6
    assert math.isclose(ops.masked_mse(**inputs, patch_size=4, norm_pix=True).item(), expected, rel_tol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_patches_of_weight_zero_may_hold_anything(each_backend, value):
    inputs = make((4, 4), grid=(2, 2))
    inputs["mask"] = torch.tensor([[0.0, 1.0, -0.0, 1.0], [1.0, 1.0, 0.0, 1.0]])
    dirty = {name: t.detach().clone() for name, t in inputs.items()}
    dirty["pred"][inputs["mask"] == 0] = value
    dirty["imgs"][:, :, 4:, :4] = value  # patch 2
    dirty["pred"].requires_grad_()
    op = partial(ops.masked_mse, patch_size=4, norm_pix=True)
    clean, got = (forward_backward(op, x, None) for x in (inputs, dirty))
    assert torch.equal(got["out"], clean["out"])
    assert torch.equal(got["d_pred"], clean["d_pred"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weighted_nan_is_not_hidden(each_backend, value):
    inputs = make((4, 4))
    inputs["mask"][0, 2] = 1
    inputs["pred"].data[0, 2, 7] = value
    assert not ops.masked_mse(**inputs, patch_size=4, norm_pix=True).isfinite()


@pytest.mark.parametrize("spread", [1.0, 1e-3, 0.0])
def test_statistics_far_from_zero(isa, spread):
    """One-pass statistics would cancel; a constant patch has a finite target."""
    cases = [make((8, 8)) for _ in range(30)]
    for inputs in cases:
        inputs["imgs"] = inputs["imgs"] * spread + 64.0
    check(cases, (8, 8))


@pytest.mark.parametrize("dtypes", [FLOATS, DTYPES["bf16"], DTYPES["fp16"], BYTES], ids=["fp32", "bf16", "fp16", "uint8"])
@pytest.mark.parametrize("layout", IMAGE_LAYOUTS.values(), ids=IMAGE_LAYOUTS)
def test_layouts(isa, layout, dtypes):
    def laid_out(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        other = layout if layout in LAYOUTS.values() else LAYOUTS["padded"]
        return {name: lay_out(layout if name == "imgs" else other, t) for name, t in inputs.items()}

    check([make((8, 6), dtypes=dtypes) for _ in range(16)], (8, 6), layout=laid_out)


@pytest.mark.parametrize("dim", range(3))
def test_zero_strides(isa, dim):
    def expanded(t: Tensor) -> Tensor:
        return t.detach().narrow(dim, 0, 1).expand(t.shape).requires_grad_(t.requires_grad)

    cases = [make((4, 4), N=3) for _ in range(6)]
    check([{name: t if t.dim() <= dim else expanded(t) for name, t in inputs.items()} for inputs in cases], (4, 4))


def test_large_gradient(isa):
    """Large enough for stores past the caches."""
    check([make((16, 16), N=4, grid=(36, 40))], (16, 16))


def test_no_samples(each_backend):
    inputs = make((4, 4))
    inputs = {name: t.detach()[:0].requires_grad_(t.requires_grad) for name, t in inputs.items()}
    loss = ops.masked_mse(**inputs, patch_size=4, norm_pix=True)
    (dpred,) = torch.autograd.grad(loss, inputs["pred"])
    assert loss.isnan()  # the mean of nothing
    assert dpred.shape == inputs["pred"].shape


def test_other_dtypes_run_eagerly(native):
    inputs = make((4, 4))
    loss = ops.masked_mse(inputs["pred"].double(), inputs["imgs"].double(), inputs["mask"], 4, True)
    assert loss.dtype == torch.float64
    with maefast.backend("native"):
        single = ops.masked_mse(**inputs, patch_size=4, norm_pix=True)
    assert math.isclose(loss.item(), single.item(), rel_tol=torch.finfo(F32).eps)


def test_images_with_a_gradient_run_eagerly(native):
    inputs = make((4, 4))
    inputs["imgs"].requires_grad_()
    got = forward_backward(partial(ops.masked_mse, patch_size=4, norm_pix=True), inputs, None)
    with maefast.backend("eager"):
        eager = forward_backward(partial(ops.masked_mse, patch_size=4, norm_pix=True), inputs, None)
    assert torch.equal(got["d_imgs"], eager["d_imgs"])
    with maefast.backend("native"), pytest.raises(RuntimeError, match=r"masked_mse.*native.*no gradient for imgs"):
        ops.masked_mse(**inputs, patch_size=4, norm_pix=True)


def test_the_caller_may_divide_the_loss_in_place(each_backend):
    inputs = make((4, 4))
    (whole,) = torch.autograd.grad(ops.masked_mse(**inputs, patch_size=4, norm_pix=True), inputs["pred"])
    loss = ops.masked_mse(**inputs, patch_size=4, norm_pix=True)
    loss /= 4
    (quarter,) = torch.autograd.grad(loss, inputs["pred"])
    assert torch.equal(quarter, whole / 4)


def test_once_differentiable(native):
    assert_once_differentiable(partial(ops.masked_mse, patch_size=4, norm_pix=True), make((4, 4)))


def test_a_penalty_on_the_gradient_raises(native):
    """Here the incoming gradient is a constant, yet dpred depends on pred: the penalty must not silently have no gradient."""
    inputs = make((4, 4))
    loss = ops.masked_mse(**inputs, patch_size=4, norm_pix=True)
    (dpred,) = torch.autograd.grad(loss, inputs["pred"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (loss + dpred.square().sum()).backward()


@pytest.mark.parametrize("compact", [True, False], ids=["compact", "all_rows"])
def test_deterministic(isa, compact):
    inputs = make((16, 16), N=4, grid=(8, 9), compact=compact)
    assert_same_for_any_threads(lambda: forward_backward(partial(ops.masked_mse, patch_size=16, norm_pix=True), inputs, None))


@pytest.mark.huge
def test_more_than_2_31_elements(native):
    """Copies of one sample: its loss, and 1/N of its gradient."""
    N = 14_300
    single = make((16, 16), N=1, grid=(14, 14), weights="ones", dtypes=DTYPES["bf16"])
    expected = forward_backward(partial(ops.masked_mse, patch_size=16, norm_pix=True), single, None)
    copies = {name: t.detach().expand(N, *t.shape[1:]).requires_grad_(t.requires_grad) for name, t in single.items()}
    assert copies["pred"].numel() > 2**31
    loss = ops.masked_mse(**copies, patch_size=16, norm_pix=True)
    assert math.isclose(loss.item(), expected["out"].item(), rel_tol=1e-6)
    dpred = torch.autograd.grad(loss, copies["pred"], torch.tensor(float(N)))[0]
    for n in (0, N // 2, N - 1):
        torch.testing.assert_close(dpred[n], expected["d_pred"][0], rtol=torch.finfo(BF16).eps, atol=0)


@pytest.mark.huge
def test_offsets_beyond_2_31(native):
    pred = torch.zeros(15_000, 1, 3 * 224 * 224, dtype=BF16)  # untouched pages take no memory
    inputs = make((224, 224), N=1, grid=(1, 1), weights="ones", dtypes=DTYPES["autocast"])
    expected = ops.masked_mse(**inputs, patch_size=224, norm_pix=True)
    pred[-1:] = inputs["pred"].detach()
    mask = torch.zeros(15_000, 1)
    mask[-1] = 1
    assert torch.equal(ops.masked_mse(pred, inputs["imgs"].expand(15_000, -1, -1, -1), mask, 224, True), expected.detach())


def test_opcheck(native):
    mean, std = torch.rand(3), torch.rand(3) + 0.2
    for dtypes, compact in ((FLOATS, False), (BYTES, True), (AUTOCAST, True), (DTYPES["fp16"], False)):
        pred, imgs, mask = make((2, 5), dtypes=dtypes, compact=compact).values()
        args = (pred.detach(), imgs, mask, 2, 5, True, *((mean, std) if imgs.dtype == U8 else (None, None)))
        torch.library.opcheck(torch.ops.maefast.masked_mse_fwd.default, args)
        torch.library.opcheck(torch.ops.maefast.masked_mse_bwd.default, (torch.tensor(0.7), *args))


def test_order_of_the_mask_does_not_matter_to_the_mean(each_backend):
    """Samples in another order: the same loss up to rounding."""
    inputs = make((4, 4), N=5)
    order = permutations(1, 5)[0]
    shuffled = {name: t[order] for name, t in inputs.items()}
    a, b = (ops.masked_mse(**x, patch_size=4, norm_pix=True).item() for x in (inputs, shuffled))
    assert math.isclose(a, b, rel_tol=1e-6)
