import math
from functools import partial

import pytest
import torch
from op_inputs import BF16, F32, MSE_DTYPES, Inputs
from specs import SPECS
from support import assert_equal, forward_backward, permutations

import maefast
from maefast import ops
from maefast.reference import ReferenceMAE

pytestmark = pytest.mark.usefixtures("poisoned")
LOSS = partial(ops.masked_mse, patch_size=4, norm_pix=True)


def make(patch: tuple[int, int], dtypes: tuple[torch.dtype, ...] = MSE_DTYPES["fp32"], **size: object) -> Inputs:
    return SPECS["masked_mse"].make(dtypes, patch, **size)


def test_by_hand(each_backend):
    imgs = torch.tensor([[[[1.0, 2.0, 9.0, 9.0], [3.0, 6.0, 9.0, 9.0]]]])  # patch 0 is 1 2 3 6, patch 1 is 9
    pred = torch.zeros(1, 2, 4, requires_grad=True)
    mask = torch.tensor([[1.0, 3.0]])
    loss = ops.masked_mse(pred, imgs, mask, 2, False)
    assert loss.item() == (50 / 4 + 3 * 81) / 4
    loss.backward()
    assert pred.grad.tolist() == [[[-1 / 8, -2 / 8, -3 / 8, -6 / 8], [-27 / 8] * 4]]
    # mean 3, unbiased variance 14/3: the target's squares sum to 3; the constant patch has target 0
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
    inputs |= {name: inputs[name].detach().double() for name in ("pred", "imgs")}
    expected = model.forward_loss(inputs["imgs"], inputs["pred"], inputs["mask"])
    torch.testing.assert_close(ops.masked_mse(**inputs, patch_size=(4, 5), norm_pix=norm_pix), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm_pix", "pixels"])
def test_removed_rows_alone_are_the_rows_of_all(native, norm_pix):
    inputs = make((4, 4), N=3)
    removed = inputs["mask"].nonzero()[:, 1].reshape(3, -1)
    index = removed[..., None].expand(-1, -1, 48)
    compact = inputs | {"pred": inputs["pred"].detach().gather(1, index).requires_grad_()}
    whole, part = (forward_backward(partial(LOSS, norm_pix=norm_pix), x, None) for x in (inputs, compact))
    assert_equal(part, whole | {"d_pred": whole["d_pred"].gather(1, index)})
    assert not whole["d_pred"][inputs["mask"] == 0].any()


def test_weights_scale_patches(each_backend):
    """Any weights: the weighted mean of the losses of single patches."""
    inputs = make((4, 4), N=1, grid=(2, 2))
    inputs["mask"] = torch.tensor([[0.5, -2.0, 3.0, 4.5]])
    single = [LOSS(**inputs | {"mask": torch.eye(4)[i : i + 1]}).item() for i in range(4)]
    expected = sum(w * loss for w, loss in zip(inputs["mask"][0].tolist(), single, strict=True)) / 6
    assert math.isclose(LOSS(**inputs).item(), expected, rel_tol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_patches_of_weight_zero_may_hold_anything(each_backend, value):
    inputs = make((4, 4), grid=(2, 2))
    inputs["mask"] = torch.tensor([[0.0, 1.0, -0.0, 1.0], [1.0, 1.0, 0.0, 1.0]])
    dirty = {name: t.detach().clone() for name, t in inputs.items()}
    dirty["pred"][inputs["mask"] == 0] = value
    dirty["imgs"][:, :, 4:, :4] = value  # patch 2
    dirty["pred"].requires_grad_()
    assert_equal(forward_backward(LOSS, dirty, None), forward_backward(LOSS, inputs, None))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weighted_nan_is_not_hidden(each_backend, value):
    inputs = make((4, 4))
    inputs["mask"][0, 2] = 1
    inputs["pred"].data[0, 2, 7] = value
    assert not LOSS(**inputs).isfinite()


@pytest.mark.parametrize("spread", [1.0, 1e-3, 0.0])
def test_statistics_far_from_zero(isa, spread):
    """One-pass statistics would cancel; a constant patch has a finite target."""
    cases = [make((8, 8)) for _ in range(30)]
    for inputs in cases:
        inputs["imgs"] = inputs["imgs"] * spread + 64.0
    SPECS["masked_mse"].check(cases, MSE_DTYPES["fp32"], patch=(8, 8))


def test_no_samples(each_backend):
    inputs = make((4, 4))
    inputs = {name: t.detach()[:0].requires_grad_(t.requires_grad) for name, t in inputs.items()}
    loss = LOSS(**inputs)
    (dpred,) = torch.autograd.grad(loss, inputs["pred"])
    assert loss.isnan()  # the mean of nothing
    assert dpred.shape == inputs["pred"].shape


def test_images_with_a_gradient_run_eagerly(native):
    inputs = make((4, 4))
    inputs["imgs"].requires_grad_()
    got = forward_backward(LOSS, inputs, None)
    with maefast.backend("eager"):
        assert_equal(got, forward_backward(LOSS, inputs, None))
    with maefast.backend("native"), pytest.raises(RuntimeError, match=r"masked_mse.*native.*no gradient for imgs"):
        LOSS(**inputs)


def test_the_caller_may_divide_the_loss_in_place(each_backend):
    inputs = make((4, 4))
    (whole,) = torch.autograd.grad(LOSS(**inputs), inputs["pred"])
    loss = LOSS(**inputs)
    loss /= 4
    (quarter,) = torch.autograd.grad(loss, inputs["pred"])
    assert torch.equal(quarter, whole / 4)


def test_a_penalty_on_the_gradient_raises(native):
    """dpred depends on pred: a penalty on it must not silently have no gradient."""
    inputs = make((4, 4))
    loss = LOSS(**inputs)
    (dpred,) = torch.autograd.grad(loss, inputs["pred"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (loss + dpred.square().sum()).backward()


@pytest.mark.huge
def test_more_than_2_31_elements(native):
    """Copies of one sample: its loss, and 1/N of its gradient."""
    N = 14_300
    single = make((16, 16), N=1, grid=(14, 14), weights="ones", dtypes=MSE_DTYPES["bf16"])
    expected = forward_backward(partial(LOSS, patch_size=16), single, None)
    copies = {name: t.detach().expand(N, *t.shape[1:]).requires_grad_(t.requires_grad) for name, t in single.items()}
    assert copies["pred"].numel() > 2**31
    loss = LOSS(**copies, patch_size=16)
    assert math.isclose(loss.item(), expected["out"].item(), rel_tol=1e-6)
    dpred = torch.autograd.grad(loss, copies["pred"], torch.tensor(float(N)))[0]
    for n in (0, N // 2, N - 1):
        torch.testing.assert_close(dpred[n], expected["d_pred"][0], rtol=torch.finfo(BF16).eps, atol=0)


@pytest.mark.huge
def test_offsets_beyond_2_31(native):
    pred = torch.zeros(15_000, 1, 3 * 224 * 224, dtype=BF16)  # untouched pages take no memory
    inputs = make((224, 224), N=1, grid=(1, 1), weights="ones", dtypes=MSE_DTYPES["autocast"])
    expected = LOSS(**inputs, patch_size=224)
    pred[-1:] = inputs["pred"].detach()
    mask = torch.zeros(15_000, 1)
    mask[-1] = 1
    assert torch.equal(ops.masked_mse(pred, inputs["imgs"].expand(15_000, -1, -1, -1), mask, 224, True), expected.detach())


def test_order_of_the_mask_does_not_matter_to_the_mean(each_backend):
    inputs, order = make((4, 4), N=5), permutations(1, 5)[0]
    shuffled = {name: t[order] for name, t in inputs.items()}
    assert math.isclose(LOSS(**shuffled).item(), LOSS(**inputs).item(), rel_tol=1e-6)
