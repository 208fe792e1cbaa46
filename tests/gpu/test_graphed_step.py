"""GraphedStep on a GPU: the eager step's losses, other masks in each replay, learning rates."""

import pytest
import torch
from support import images_for, noise_for, small_mae

from maefast.train.optim import adamw
from maefast.train.step import GraphedStep, training_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BF16 = torch.bfloat16


def trained(graphed: bool, autocast: torch.dtype | None, rates: list[float]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the loss of a step at each rate, on one batch, and the weights after them."""
    model = small_mae().cuda()
    imgs = images_for(model).cuda()
    optimizer = adamw(model, rates[0], backend="torch", capturable=True)
    torch.manual_seed(3)
    run = GraphedStep(model, optimizer, imgs, autocast=autocast) if graphed else None
    losses = []
    for rate in rates:
        for group in optimizer.param_groups:
            group["lr"] = rate if graphed else torch.tensor(rate, device="cuda")  # in fp32, as the graph has it
        losses.append(run(imgs) if run else training_step(model, optimizer, imgs, autocast=autocast, return_pred=False))
    return [loss.item() for loss in losses], dict(model.named_parameters())


@pytest.mark.parametrize("autocast", [None, BF16], ids=["fp32", "bf16"])
def test_trains_as_the_eager_step(autocast):
    rates = [0.01, 0.01, 0.1, 0.0, 0.01]
    losses, weights = trained(True, autocast, rates)
    expected, expected_weights = trained(False, autocast, rates)
    assert losses == pytest.approx(expected, rel=1e-6 if autocast is None else 1e-3)
    for name, want in expected_weights.items():
        if "qkv.bias" not in name:  # a key's bias has no gradient but rounding errors, which Adam scales up
            assert torch.allclose(weights[name], want, rtol=0, atol=1e-4 if autocast is None else 1e-2), name


def test_masks_differ_between_replays():
    """At a learning rate of zero only the mask can change the loss."""
    losses, _ = trained(True, None, [0.0] * 4)
    assert len(set(losses)) == 4


def test_a_learning_rate_takes_effect():
    still, _ = trained(True, None, [0.0] * 4)
    moved, _ = trained(True, None, [0.0, 0.1, 0.0, 0.0])
    assert moved[:2] == still[:2]
    assert moved[2] != still[2]


def test_noise_of_ones_own_and_clipping():
    """The graph reads the noise of each call and clips the gradient as the eager step does."""
    losses, norms = [], []
    for graphed in (True, False):
        model = small_mae().cuda()
        imgs = images_for(model).cuda()
        draws = [noise_for(model, seed=seed).cuda() for seed in range(3)]
        optimizer = adamw(model, 0.0, backend="torch", capturable=True)
        run = GraphedStep(model, optimizer, imgs, clip_grad=1e-3, noise=draws[0]) if graphed else None
        for noise in draws:
            losses.append(run(imgs, noise).item() if run else model(imgs, noise=noise, return_pred=False).loss.item())
        if graphed:
            norms.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-6)
    assert len(set(losses[:3])) == 3
    assert norms == [pytest.approx(1e-3, rel=1e-3)]


def test_a_step_does_not_wait_for_the_gpu():
    model = small_mae().cuda()
    imgs = images_for(model).cuda()
    run = GraphedStep(model, adamw(model, 0.01, backend="torch", capturable=True), imgs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [run(imgs) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()
