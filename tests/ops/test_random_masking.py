import math

import pytest
import torch
from support import LAYOUTS, assert_equal, assert_same_for_any_threads, permutations
from torch import Tensor

from maefast import ops

pytestmark = pytest.mark.usefixtures("poisoned")

NAN, INF = math.nan, math.inf


def by_sorting_pairs(noise: Tensor, len_keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """The definition in the contract: pairs (noise, index) in order, NaN after everything else."""
    rows = [[(x != x, 0.0 if x != x else x, i) for i, x in enumerate(row)] for row in noise.tolist()]
    ids_shuffle = torch.tensor([[i for *_, i in sorted(row)] for row in rows])
    ids_restore = torch.tensor([[sorted(row).index(pair) for pair in row] for row in rows])
    return ids_shuffle[:, :len_keep], ids_restore, (ids_restore >= len_keep).float()


def special_noise(N: int, L: int) -> Tensor:
    """Many ties, both zeros, infinities and both NaNs, scattered."""
    values = torch.tensor([0.0, -0.0, 0.5, -0.5, 1e-40, -1e-40, INF, -INF, NAN, -NAN, 0.25, 1.0])
    return values[torch.randint(len(values), (N, L))]


def test_by_hand(isa):
    noise = torch.tensor([[0.3, NAN, 0.1, 0.3, -0.0, 0.0, INF, -INF], [0.0, -0.0, NAN, -NAN, 0.0, -1.0, 2.0, -0.0]])
    ids_keep, ids_restore, mask = (t.tolist() for t in ops.random_masking(noise, 3))
    assert ids_restore == [[4, 7, 3, 5, 1, 2, 6, 0], [1, 2, 6, 7, 3, 0, 5, 4]]
    assert ids_keep == [[7, 4, 5], [5, 0, 1]]
    assert mask == [[1, 1, 1, 1, 0, 0, 1, 0], [0, 0, 1, 1, 1, 0, 1, 1]]


@pytest.mark.parametrize("make", [torch.rand, torch.randn, special_noise], ids=["uniform", "normal", "special"])
def test_reference_is_the_definition(make):
    noise = make(4, 300)
    assert_equal(ops.random_masking_ref(noise, 75), by_sorting_pairs(noise, 75))


@pytest.mark.parametrize("make", [torch.rand, special_noise], ids=["uniform", "special"])
@pytest.mark.parametrize("L", [1, 5, 63, 196, 300, 3000])
def test_equals_reference(isa, L, make):
    noise = make(7, L)
    for len_keep in {0, 1, L // 4, L}:
        assert_equal(ops.random_masking(noise, len_keep), ops.random_masking_ref(noise, len_keep))


@pytest.mark.parametrize("L", [49, 1000])
def test_ranks_of_a_constant_are_the_indices(isa, L):
    for value in (0.5, NAN, -0.0, INF):
        ids_restore = ops.random_masking(torch.full((2, L), value), L // 2)[1]
        assert torch.equal(ids_restore, torch.arange(L).expand(2, L))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("L", [37, 700])
def test_layouts(isa, layout, L):
    noise = torch.rand(5, L)
    assert_equal(ops.random_masking(layout(noise), 9), ops.random_masking_ref(noise, 9))


def test_zero_strides(isa):
    row, column = torch.rand(1, 50), torch.rand(6, 1)
    assert_equal(ops.random_masking(row.expand(6, 50), 20), ops.random_masking_ref(row.repeat(6, 1), 20))
    assert torch.equal(ops.random_masking(column.expand(6, 50), 20)[0], torch.arange(20).expand(6, 20))


@pytest.mark.parametrize(("N", "L", "len_keep"), [(0, 196, 49), (0, 0, 0), (3, 0, 0)])
def test_empty(each_backend, N, L, len_keep):
    I64 = torch.int64
    expected = (torch.empty(N, len_keep, dtype=I64), torch.empty(N, L, dtype=I64), torch.empty(N, L))
    assert_equal(ops.random_masking(torch.rand(N, L), len_keep), expected)


def test_a_permutation_of_integers_ranks_as_itself(each_backend):
    ids = permutations(3, 400)
    assert torch.equal(ops.random_masking(ids.float(), 100)[1], ids)


@pytest.mark.parametrize("L", [300, 3000])
def test_threads_do_not_matter(isa, L):
    noise = torch.rand(301, L)
    names = ("ids_keep", "ids_restore", "mask")
    assert_same_for_any_threads(lambda: dict(zip(names, ops.random_masking(noise, L // 4), strict=True)))


def test_opcheck(native):
    for N, L, len_keep in ((3, 20, 5), (1, 5, 0)):
        torch.library.opcheck(torch.ops.maefast.random_masking_fwd.default, (torch.rand(N, L), len_keep))
