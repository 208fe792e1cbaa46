"""The ops as torch sees them: schemas, fakes, and one graph under torch.compile."""

import pytest
import torch
from support import assert_equal
from tritonrun import permutations, random, run_step, step, step_inputs

from maefast.kernels import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs the interpreter or a GPU")


def test_opcheck():
    imgs, ids, half = random(2, 3, 4, 6), permutations(2, 6), torch.float16
    mse = (random(2, 6, 12), imgs, (ids >= 2).float(), 2, 2, True, None, None)
    x, weight, bias, statistics = random(2, 3, 8), random(8), random(8), (random(6), random(6))
    for name, args in (
        ("random_masking_fwd", (random(2, 6), 2)),
        ("gather_patches_fwd", (imgs, ids[:, :2], 2, 2, None, None, half)),
        ("unshuffle_fwd", (random(2, 3, 8), ids, random(1, 1, 8), random(1, 7, 8))),
        ("unshuffle_bwd", (random(2, 7, 8), ids, 2, half)),
        ("masked_mse_fwd", mse),
        ("masked_mse_bwd", (random(), *mse)),
        ("layer_norm_fwd", (x, weight, bias, 1e-5, half)),
        ("add_layer_norm_fwd", (x.half(), x, weight, bias, 1e-5, half)),
        *(("layer_norm_bwd", (x.half(), x, x, weight, bias, *statistics, d, d, d is None)) for d in (None, half)),
        ("bias_gelu_fwd", (x, bias)),
        *(("bias_gelu_bwd", args) for args in ((x.half(), x, bias, True), (x, x, None, False), (x, x, None, False, True))),
    ):
        op = getattr(torch.ops.maefast_triton, name).default
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_fullgraph_forward_and_backward():
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for N in (2, 3, 4):
        inputs = step_inputs(N)
        assert_equal(run_step(compiled, inputs, "triton"), run_step(step, inputs, "triton"))
