"""A training step on the Triton ops against the reference; products and attention are others'."""

import copy

import pytest
import torch
from support import Calls, images_for, noise_for, small_mae, small_reference, stacked
from tritonrun import DEVICE, F16

import maefast
from maefast.kernels import OPS
from maefast.testing.errors import assert_close_to_float64

SHALLOW = {"depth": 1, "img_size": (32, 32), "embed_dim": 128, "decoder_embed_dim": 96}


def step(model, imgs, noise, mode, **options):
    model.zero_grad()
    with torch.autocast(DEVICE, F16, enabled=mode == "autocast"):
        loss, pred, _ = model(imgs, noise=noise, **options)
    loss.backward()
    results = {"loss": loss.detach()} | ({} if pred is None else {"pred": pred.detach()})
    return results | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("mode", "options", "batches"), [("fp32", {"return_pred": False}, 4), ("autocast", {}, 8)])
def test_step(mode, options, batches):
    reference = small_reference(**SHALLOW).to(DEVICE)
    model = small_mae(seed=9, **SHALLOW).to(DEVICE)
    model.load_state_dict(reference.state_dict())
    exact_model = copy.deepcopy(reference).double()
    got, eager, exact = [], [], []
    for seed in range(batches):
        imgs, noise = (make(model, N=1, seed=seed).to(DEVICE) for make in (images_for, noise_for))
        with maefast.backend("triton"), Calls("maefast_triton") as calls:
            got.append(step(model, imgs, noise, mode, **options))
        eager.append(step(reference, imgs, noise, mode))
        exact.append(step(exact_model, imgs.double(), noise, "fp32"))
    backward = {f"{op}_bwd" for op in ("unshuffle", "masked_mse", "layer_norm", "bias_gelu")}
    assert {name.removesuffix("_fwd") for name in calls.names} == OPS | backward
    mine, theirs, truth = map(stacked, (got, eager, exact))
    for name, value in mine.items():
        assert value.dtype == theirs[name].dtype
        assert_close_to_float64(f"{mode}, {name}", value, theirs[name], truth[name])


def test_a_watched_block_runs_as_modules():
    """A hook sees the output of its module, which the chain of ops does not make."""
    model = small_mae(**SHALLOW).to(DEVICE)
    block, x = model.blocks[0], torch.rand(2, 3, 128, device=DEVICE)
    outputs = []
    with maefast.backend("triton"):
        expected = block(x)
        hook = block.mlp.fc1.register_forward_hook(lambda module, args, out: outputs.append(out))
        watched = block(x)
        hook.remove()
    assert outputs[0].shape == (2, 3, 512)
    torch.testing.assert_close(watched, expected)
