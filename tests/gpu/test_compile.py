"""torch.compile(mode="reduce-overhead") on a GPU: steps as CUDA graphs, each with fresh masks."""

import copy

import pytest
import torch
from support import images_for, noise_for, small_mae, small_reference, stacked, step
from torch._dynamo.utils import counters

from maefast.testing.errors import assert_close_to_float64

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"), pytest.mark.usefixtures("fresh_dynamo")]

STEPS = 6  # a warm-up, a recording, replays


@pytest.mark.parametrize("options", [{}, {"return_pred": False}], ids=["pred", "no_pred"])
def test_reduce_overhead(options):
    reference = small_reference(depth=1).cuda()
    model, exact_model = small_mae(depth=1).cuda(), copy.deepcopy(reference).double()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    counters.clear()
    got, eager, exact = [], [], []
    for i in range(STEPS):
        imgs, noise = images_for(model, seed=2 * i).cuda(), noise_for(model, seed=2 * i + 1).cuda()
        torch.compiler.cudagraph_mark_step_begin()
        mine = step(compiled, imgs, noise, **options)
        got.append({name.removeprefix("_orig_mod."): value.clone() for name, value in mine.items()})  # a replay writes here again
        eager.append(step(reference, imgs, noise))
        exact.append(step(exact_model, imgs.double(), noise))
    assert counters["inductor"]["cudagraph_skips"] == 0
    mine, theirs, truth = map(stacked, (got, eager, exact))
    assert torch.equal(mine.pop("mask"), theirs["mask"])
    for name, value in mine.items():
        assert_close_to_float64(name, value, theirs[name], truth[name])


def test_each_replay_masks_anew():
    model = small_mae(depth=1).cuda()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    imgs, masks = images_for(model, N=8).cuda(), []
    for _ in range(STEPS):
        torch.compiler.cudagraph_mark_step_begin()
        loss, _, mask = compiled(imgs)
        masks.append(mask.clone())
        loss.backward()
        model.zero_grad(set_to_none=True)  # a gradient is memory of the graph, which the next replay writes again
    assert all((mask == 0).sum(dim=1).eq(6).all() for mask in masks)
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])
