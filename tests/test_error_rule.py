"""The error rule of DESIGN.md: against float64, by the error of eager runs."""

import pytest
import torch

from maefast.testing.errors import assert_close_to_float64


def test_error_rule_allows_twice_the_error_of_eager_and_one_eps():
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)  # norm 5
    eager = (exact + torch.tensor([0.05, 0.0])).double()  # L2 0.01, max 0.0125
    assert_close_to_float64("inside", exact + torch.tensor([0.0999, 0.0]), eager, exact)
    with pytest.raises(AssertionError, match=r"outside: relative L2 error 0\.0202 > 0\.02 = 2 x eager's 0\.01"):
        assert_close_to_float64("outside", exact + torch.tensor([0.101, 0.0]), eager, exact)
    eps = torch.finfo(torch.bfloat16).eps
    one = torch.ones(1, dtype=torch.float64)
    assert_close_to_float64("one eps", (one + eps).bfloat16(), one.bfloat16(), one)
    with pytest.raises(AssertionError, match="two eps"):
        assert_close_to_float64("two eps", (one + 2 * eps).bfloat16(), one.bfloat16(), one)


def test_error_rule_takes_the_larger_error_of_several_eager_runs():
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)  # norm 5
    near, far = (exact + torch.tensor([error, 0.0]) for error in (0.005, 0.05))
    for runs in ([near, far], [far, near], [far]):
        assert_close_to_float64("inside", exact + torch.tensor([0.0999, 0.0]), runs, exact)
        with pytest.raises(AssertionError, match=r"outside: relative L2 error 0\.0202 > 0\.02 = 2 x eager's 0\.01"):
            assert_close_to_float64("outside", exact + torch.tensor([0.101, 0.0]), runs, exact)
    for runs in ([near, exact * torch.nan], [exact * torch.nan, near]):
        with pytest.raises(AssertionError, match="nan: relative L2 error"):
            assert_close_to_float64("nan", exact, runs, exact)
    with pytest.raises(AssertionError, match="shape: shapes"):
        assert_close_to_float64("shape", exact, [near, near[:1]], exact)


def test_error_rule_is_absolute_where_the_truth_is_zero():
    """A rounded zero of float64 gives no scale: 1e-7 is no error of a thousand million."""
    for zero in (0.0, 1e-17):
        exact = torch.full((2, 8), zero, dtype=torch.float64)
        eager, eps = torch.zeros(2, 8), torch.finfo(torch.float32).eps
        assert_close_to_float64("inside", eager + 0.9 * eps, eager, exact)
        with pytest.raises(AssertionError, match="outside: relative L2 error"):
            assert_close_to_float64("outside", eager + 1.1 * eps, eager, exact)
        one = eager.clone()
        one[0, 0] = 1.1 * eps
        with pytest.raises(AssertionError, match="outside: relative max error"):
            assert_close_to_float64("outside", one, eager, exact)
    small = torch.full((2,), 1e-12, dtype=torch.float64)
    with pytest.raises(AssertionError, match="small: relative L2 error 1 >"):
        assert_close_to_float64("small", torch.zeros(2), small.float(), small)


def test_error_rule_refuses_nan_and_other_shapes_and_takes_empty_tensors():
    exact = torch.ones(2, dtype=torch.float64)
    nan = torch.tensor([1.0, float("nan")])
    for got, eager in ((nan, exact.float()), (exact.float(), nan), (nan, nan)):
        with pytest.raises(AssertionError):
            assert_close_to_float64("nan", got, eager, exact)
    with pytest.raises(AssertionError, match="differ"):
        assert_close_to_float64("shape", torch.ones(1), exact.float(), exact)
    empty = torch.empty(0, 3)
    assert_close_to_float64("empty", empty, empty, empty.double())
