from functools import partial

import pytest
import torch
from tritonrun import DEVICE, F16, F32, FLOATS, U8, check, permutations, random

import maefast
from maefast import ops


def run(patch, dtypes=(F32, F32), grid=(3, 2), C=3, N=2, K=2, compact=False, weights=None):
    L, P = grid[0] * grid[1], C * patch[0] * patch[1]
    mask = (permutations(N, L) >= K).float() if weights is None else weights
    inputs = {
        "pred": random(N, L - K if compact else L, P, dtype=dtypes[0]).requires_grad_(),
        "imgs": random(N, C, grid[0] * patch[0], grid[1] * patch[1], dtype=dtypes[1]),
        "mask": mask,
    }
    return inputs | ({"mean": random(C), "std": torch.rand(C, device=DEVICE) + 0.2} if dtypes[1] == U8 else {})


def op(patch, norm_pix=True):
    return partial(ops.masked_mse, patch_size=patch, norm_pix=norm_pix)


@pytest.mark.parametrize("patch", [(1, 2), (2, 2), (7, 5), (14, 14), (16, 16)])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_patches(patch, norm_pix):
    check(op(patch, norm_pix), *(run(patch, N=1) for _ in range(3)))


@pytest.mark.parametrize("pred", FLOATS)
@pytest.mark.parametrize("imgs", [*FLOATS, U8])
@pytest.mark.parametrize("compact", [True, False])
def test_dtypes(pred, imgs, compact):
    inputs = run((4, 8), (pred, imgs), grid=(2, 2), K=1, compact=compact)
    more = [inputs | {"pred": torch.randn_like(inputs["pred"]).requires_grad_()} for _ in range(2)]
    check(op((4, 8)), inputs, *more)


@pytest.mark.parametrize("C", [1, 2, 5, 13])
def test_channels(C):
    check(op((4, 3)), *(run((4, 3), C=C, N=1) for _ in range(3)))


def test_weights():
    for weights in (torch.ones(2, 6), torch.rand(2, 6) * 7 + 0.01, torch.eye(12)[5].reshape(2, 6)):
        check(op((2, 3)), *(run((2, 3), weights=weights.to(DEVICE)) for _ in range(3)))


def test_strides_of_the_mask_change_no_bit():
    inputs, gradients = run((1, 2), grid=(4, 3), C=1, N=16), []
    weights = torch.rand(12, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE).t()
    for mask in (weights, weights.contiguous()):
        with maefast.backend("triton"):
            loss = ops.masked_mse(inputs["pred"], inputs["imgs"], mask, (1, 2), True)
        gradients += torch.autograd.grad(loss, inputs["pred"])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("compact", [True, False])
def test_groups(compact, monkeypatch):
    """Several patches a program, fewer in a row's last; rows longer than one block of weights."""
    from maefast.kernels import masked_mse

    chosen = masked_mse.launch_config
    monkeypatch.setattr(masked_mse, "launch_config", lambda *shape: chosen(*shape) | {"GROUP": 4})
    check(op((2, 2)), *(run((2, 2), grid=(3, 2), N=3, compact=compact) for _ in range(2)))
    check(op((1, 2)), run((1, 2), grid=(15, 18), C=1, N=1, K=200, compact=compact))


def test_layouts():
    inputs = run((4, 6), grid=(2, 2), K=1)
    shape = inputs["imgs"].shape
    for imgs in (random(*shape).contiguous(memory_format=torch.channels_last), random(2, 4, 9, 14)[:, 1:, 1:, 2:]):
        check(op((4, 6)), inputs | {"imgs": imgs})
    for pred in (random(2, 5, 72)[:, 1:], random(2, 72, 4).mT, random(2 * 4 * 72 + 1)[1:].reshape(2, 4, 72)):
        check(op((4, 6)), inputs | {"pred": pred.requires_grad_()})


def test_patches_of_no_weight_may_hold_anything():
    inputs = run((2, 2), dtypes=(F16, F32))
    kept = (inputs["mask"] == 0)[..., None]
    poisoned = inputs | {"pred": inputs["pred"].detach().masked_fill(kept, float("nan")).requires_grad_()}
    with maefast.backend("triton"):
        got, clean = (torch.autograd.grad(op((2, 2))(**case), case["pred"])[0] for case in (poisoned, inputs))
    assert torch.equal(got, clean)
    assert not got[kept.expand_as(got)].any()


def test_a_mask_that_does_not_fit_stays_in_bounds():
    """On a GPU nothing checks the values first: rows without a patch get a gradient of zero."""
    inputs = run((2, 2), compact=True)
    for removed in (1, 6):
        mask = (torch.arange(6, device=DEVICE) < removed).float().expand(2, 6)
        with maefast.backend("triton"):
            (dpred,) = torch.autograd.grad(op((2, 2))(**inputs | {"mask": mask}), inputs["pred"])
        assert dpred.isfinite().all()
        assert not dpred[:, removed:].any()


def test_loss_may_be_scaled_in_place_and_n_may_be_0():
    inputs = run((2, 2))
    with maefast.backend("triton"):
        loss = op((2, 2))(**inputs)
        loss /= 4
        loss.backward()
        empty = run((2, 2), N=0)
        (dpred,) = torch.autograd.grad(op((2, 2))(**empty), empty["pred"])
    assert dpred.shape == empty["pred"].shape


def test_large_patches_are_left_to_others():
    inputs = run((64, 32), grid=(1, 1), K=0)
    with maefast.backend("triton"), pytest.raises(RuntimeError, match="up to 4096"):
        op((64, 32))(**inputs)
    inputs = run((2, 2))
    inputs["imgs"].requires_grad_()
    with maefast.backend("triton"), pytest.raises(RuntimeError, match="gradient for imgs"):
        op((2, 2))(**inputs)
