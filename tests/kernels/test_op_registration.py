"""The ops as torch sees them: schemas, fakes, and one graph under torch.compile."""

import pytest
import torch
from tritonrun import permutations, random, run_step, step, step_inputs

from maefast.kernels import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs the interpreter or a GPU")


def test_opcheck():
    maefast_triton = torch.ops.maefast_triton
    imgs, ids, noise = random(2, 3, 4, 6), permutations(2, 6), random(2, 6)
    mse = (random(2, 6, 12), imgs, (ids >= 2).float(), 2, 2, True, None, None)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(maefast_triton.random_masking_fwd.default, (noise, 2), test_utils=checks)
    gather = (imgs, ids[:, :2], 2, 2, None, None, torch.float16)
    torch.library.opcheck(maefast_triton.gather_patches_fwd.default, gather, test_utils=checks)
    tokens = (random(2, 3, 8), ids, random(1, 1, 8), random(1, 7, 8))
    torch.library.opcheck(maefast_triton.unshuffle_fwd.default, tokens, test_utils=checks)
    torch.library.opcheck(maefast_triton.unshuffle_bwd.default, (random(2, 7, 8), ids, 2, torch.float16), test_utils=checks)
    torch.library.opcheck(maefast_triton.masked_mse_fwd.default, mse, test_utils=checks)
    torch.library.opcheck(maefast_triton.masked_mse_bwd.default, (random(), *mse), test_utils=checks)
    x, weight, bias = random(2, 3, 8), random(8), random(8)
    torch.library.opcheck(maefast_triton.layer_norm_fwd.default, (x, weight, bias, 1e-5, torch.float16), test_utils=checks)
    add = (x.half(), x, weight, bias, 1e-5, torch.float16)
    torch.library.opcheck(maefast_triton.add_layer_norm_fwd.default, add, test_utils=checks)
    for dtype in (None, torch.float16):
        norm = (x.half(), x, x, weight, bias, random(6), random(6), dtype, dtype, dtype is None)
        torch.library.opcheck(maefast_triton.layer_norm_bwd.default, norm, test_utils=checks)
    torch.library.opcheck(maefast_triton.bias_gelu_fwd.default, (x, bias), test_utils=checks)
    for args in ((x.half(), x, bias, True), (x, x, None, False), (x, x, None, False, True)):
        torch.library.opcheck(maefast_triton.bias_gelu_bwd.default, args, test_utils=checks)


def test_fullgraph_forward_and_backward():
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for N in (2, 3, 4):
        inputs = step_inputs(N)
        for got, expected in zip(run_step(compiled, inputs, "triton"), run_step(step, inputs, "triton"), strict=True):
            assert torch.equal(got, expected)
