"""GraphedStep without a GPU: conftest.py has a stand-in for the capture, tests/gpu the graph."""

import pytest
import torch
from support import assert_equal, images_for, small_mae

from maefast.train.optim import adamw
from maefast.train.step import GraphedStep, training_step

LR = 0.01


def trained(graphed: bool, autocast: torch.dtype | None = None, steps_before: int = 0) -> tuple[list[float], list[torch.Tensor]]:
    """Return the losses of four steps, with another rate from the third on, and the weights."""
    model = small_mae()
    optimizer = adamw(model, LR, capturable=True)
    batches = [images_for(model, seed=seed) for seed in range(4)]
    torch.manual_seed(3)
    for _ in range(steps_before):
        training_step(model, optimizer, batches[0], return_pred=False)
    run = GraphedStep(model, optimizer, batches[0], autocast=autocast) if graphed else None
    losses = []  # read at the end: a later call must leave them alone
    for imgs, rate in zip(batches, (LR, LR, 10 * LR, 10 * LR), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate if graphed else torch.tensor(rate)  # in fp32, as the graph has it
        losses.append(run(imgs) if run else training_step(model, optimizer, imgs, autocast=autocast, return_pred=False))
    return [loss.item() for loss in losses], list(model.parameters())


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_trains_as_the_eager_step(without_graphs, autocast, steps_before):
    """The warm-up leaves no trace in weights, optimizer or generator; an assigned rate counts."""
    (losses, weights), (expected, expected_weights) = (trained(graphed, autocast, steps_before) for graphed in (True, False))
    assert losses == expected
    assert len(set(losses)) == 4
    assert_equal(weights, expected_weights)


def test_learning_rates_stay_in_their_tensors(without_graphs):
    model = small_mae()
    optimizer = adamw(model, LR, capturable=True)
    run = GraphedStep(model, optimizer, images_for(model))
    tensors = [group["lr"] for group in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    run(images_for(model))
    scheduler.step()
    optimizer.param_groups[1]["lr"] = 0.25
    run(images_for(model))
    assert all(group["lr"] is tensor for group, tensor in zip(optimizer.param_groups, tensors, strict=True))
    assert [tensor.item() for tensor in tensors] == pytest.approx([LR / 2, 0.25])


def test_a_capture_that_fails_leaves_no_trace(without_graphs, monkeypatch):
    model = small_mae()
    before = [p.detach().clone() for p in model.parameters()]

    def fails(run, device):
        run()
        raise RuntimeError("out of memory")

    monkeypatch.setattr("maefast.train.step._captured", fails)
    optimizer = adamw(model, LR, capturable=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        GraphedStep(model, optimizer, images_for(model))
    assert [group["lr"] for group in optimizer.param_groups] == [LR, LR]
    assert not any(isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups)
    assert_equal(list(model.parameters()), before)


def test_other_images(without_graphs):
    model = small_mae()
    run = GraphedStep(model, adamw(model, LR, capturable=True), images_for(model, 3))
    for imgs in (images_for(model, 2), images_for(model, 3, torch.bfloat16)):
        with pytest.raises(ValueError, match=r"imgs must be as those.*captured with, \(3, .*float32; they are \(\d"):
            run(imgs)


def test_what_it_refuses():
    model = small_mae()
    imgs, optimizer = images_for(model), adamw(model, LR, capturable=True)
    sgd = torch.optim.SGD(model.parameters(), LR)
    half = r"autocast must be torch\.bfloat16 or None; it is torch\.float16, which .*scaler"
    for error, message, arguments, options in (
        (TypeError, "optimizer must be torch's Adam or AdamW; it is SGD", (sgd, imgs), {}),
        (ValueError, "optimizer must have capturable=True", (adamw(model, LR), imgs), {}),
        (ValueError, half, (optimizer, imgs), {"autocast": torch.float16}),
        (ValueError, "model and imgs must be on one device; they are on cpu, meta", (optimizer, imgs.to("meta")), {}),
        (RuntimeError, "GraphedStep needs CUDA; model and imgs are on cpu", (optimizer, imgs), {}),
    ):
        with pytest.raises(error, match=message):
            GraphedStep(model, *arguments, **options)
    assert all(group["lr"] == LR for group in optimizer.param_groups)
