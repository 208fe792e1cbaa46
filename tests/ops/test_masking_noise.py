import pytest
import torch
from support import assert_equal

from maefast import ops


@pytest.mark.parametrize(("N", "L"), [(64, 196), (1, 1), (3, 0), (0, 5)])
@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")], ids=["str", "device"])
def test_is_the_draw_of_torch_rand(N, L, device):
    torch.manual_seed(5)
    noise, after = ops.masking_noise(N, L, device), torch.rand(3)
    torch.manual_seed(5)
    assert_equal((noise, after), (torch.rand(N, L), torch.rand(3)))  # the generator has advanced as far


def test_is_fp32_whatever_the_default_dtype():
    expected = torch.rand(4, 9, generator=torch.Generator().manual_seed(5))
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(5)
        assert torch.equal(ops.masking_noise(4, 9, "cpu"), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_two_draws_differ():
    assert not torch.equal(ops.masking_noise(2, 50, "cpu"), ops.masking_noise(2, 50, "cpu"))


def test_opcheck():
    op = torch.ops.maefast.masking_noise.default
    assert torch.Tag.nondeterministic_seeded in op.tags
    torch.library.opcheck(op, (3, 20, torch.device("cpu")))
