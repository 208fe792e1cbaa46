"""What holds for every op of specs.py; what is special to one is in its own file.

Whatever a kernel allocates and does not write is poisoned.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest
import support
import torch
from op_inputs import Inputs, Size
from specs import SPECS, Grid, Layout, OpSpec, incoming
from support import LAYOUTS, Op, assert_equal, forward_backward, sliced
from torch import Tensor

import maefast

pytestmark = pytest.mark.usefixtures("poisoned")


class Case(NamedTuple):
    spec: OpSpec
    dtypes: str
    size: Size
    repeats: int = 1

    @property
    def op(self) -> Op:
        return self.spec.op(self.spec.dtypes[self.dtypes], **self.size)

    def make(self) -> Inputs:
        return self.spec.make(self.spec.dtypes[self.dtypes], **self.size)

    def check(self, layout: Layout = lambda t: t) -> None:
        cases = [self.make() for _ in range(self.repeats)]
        self.spec.check(cases, self.spec.dtypes[self.dtypes], layout, **self.size)


def cases(pick: Callable[[OpSpec], Iterable[Grid]]) -> pytest.MarkDecorator:
    """Parametrise a test by the cases of some grids of each op."""
    found = {
        "-".join([name, dtypes, *(f"{k}={v}" for k, v in size.items())]): Case(spec, dtypes, size, grid.repeats)
        for name, spec in SPECS.items()
        for grid in pick(spec)
        for size in grid.sizes
        for dtypes in grid.dtypes
    }
    return pytest.mark.parametrize("case", found.values(), ids=found)


def small(spec: OpSpec, dtypes: Iterable[str] | None = None) -> Grid:
    return Grid(spec.small, tuple(dtypes or [next(iter(spec.dtypes))]))


@cases(lambda spec: spec.grids)
def test_against_float64(isa, case):
    case.check()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@cases(lambda spec: [spec.layouts])
def test_layouts(isa, case, layout):
    case.check(lambda t: layout(t) if t.dim() > 1 else spread_out(t))


@cases(lambda spec: [spec.layouts] if spec.takes_images else [])
def test_images_in_channels_last(isa, case):
    case.check(lambda t: support.channels_last(t) if t.dim() == 4 else spread_out(t))


def spread_out(t: Tensor) -> Tensor:
    return sliced(t) if t.dim() else t


@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (0, 1), (0, 1, 2)], ids=str)
@cases(lambda spec: [spec.strided])
def test_zero_strides(isa, case, dims):
    """Zero strides give the bits of a copy without them. Ranks stay permutations."""

    def expanded(t: Tensor) -> Tensor:
        if t.dim() <= max(dims) or not (t.is_floating_point() or dims == (0,)):
            return t
        shape = [1 if dim in dims else size for dim, size in enumerate(t.shape)]
        return t.detach()[tuple(slice(size) for size in shape)].expand(t.shape).requires_grad_(t.requires_grad)

    def copied(t: Tensor) -> Tensor:
        return t.detach().clone(memory_format=torch.contiguous_format).requires_grad_(t.requires_grad)

    inputs = {name: expanded(t) for name, t in case.make().items()}
    copies = {name: copied(t) for name, t in inputs.items()}
    with maefast.backend("native"):
        dy = expanded(incoming(case.op(**copies)))
        assert_equal(forward_backward(case.op, inputs, dy), forward_backward(case.op, copies, dy.contiguous()))


@cases(lambda spec: [Grid(spec.empty, tuple(spec.dtypes)[:1])])
def test_nothing_to_do(each_backend, case):
    inputs = case.make()
    with maefast.backend("eager"), torch.no_grad():
        shape = case.op(**case.spec.exact(inputs)).shape
    results = forward_backward(case.op, inputs, torch.ones(shape))
    assert results["out"].shape == shape
    for name, t in inputs.items():
        if t.requires_grad:
            assert results[f"d_{name}"].shape == t.shape
            assert not results[f"d_{name}"].any()


def leaf_names() -> list[tuple[str, str]]:
    found = {name: spec.make(next(iter(spec.dtypes.values())), **spec.small[0]) for name, spec in SPECS.items()}
    return [(name, leaf) for name, inputs in found.items() for leaf, t in inputs.items() if t.requires_grad]


@pytest.mark.parametrize(("name", "leaf"), leaf_names())
def test_one_gradient_at_a_time(each_backend, name, leaf):
    spec = SPECS[name]
    case = Case(spec, next(iter(spec.dtypes)), spec.small[0])
    inputs = case.make()
    dy = incoming(case.op(**inputs).detach())
    expected = forward_backward(case.op, inputs, dy)[f"d_{leaf}"]
    alone = {k: t.detach().requires_grad_(k == leaf) for k, t in inputs.items()}
    assert torch.equal(forward_backward(case.op, alone, dy)[f"d_{leaf}"], expected)


@cases(lambda spec: [small(spec)])
def test_reference_gradients(case):
    wide = case.spec.exact(case.make())
    tensors = {k: t.detach().requires_grad_(t.is_floating_point() and k != "mask") for k, t in wide.items()}
    assert torch.autograd.gradcheck(lambda *values: case.op(**dict(zip(tensors, values, strict=True))), tuple(tensors.values()))


@cases(lambda spec: [small(spec)])
def test_float64_runs_eagerly(case):
    inputs = case.spec.exact(case.make())
    got = case.op(**inputs)
    with maefast.backend("eager"):
        assert_equal(got, case.op(**inputs))
    assert got.dtype == torch.float64


@cases(lambda spec: [small(spec)])
def test_once_differentiable(native, case):
    with maefast.backend("native"):
        support.assert_once_differentiable(case.op, case.make())


@cases(lambda spec: [spec.parallel])
def test_deterministic(isa, case):
    inputs = case.make()
    dy = incoming(case.op(**inputs).detach())
    with maefast.backend("native"):
        support.assert_same_for_any_threads(lambda: forward_backward(case.op, inputs, dy))


@cases(lambda spec: [small(spec)])
def test_fullgraph(native, fresh_dynamo, case):
    inputs = case.make()
    dy = incoming(case.op(**inputs).detach())
    with maefast.backend("native"):
        compiled = torch.compile(case.op, fullgraph=True, backend="aot_eager")
        assert_equal(forward_backward(compiled, inputs, dy), forward_backward(case.op, inputs, dy))


@cases(lambda spec: [small(spec, spec.dtypes)] if spec.native else [])
def test_opcheck(native, case):
    inputs = {name: t.detach() for name, t in case.make().items()}
    for name, args in case.spec.native(inputs, case.spec.dtypes[case.dtypes], **case.size):
        torch.library.opcheck(getattr(torch.ops.maefast, name).default, args)


@pytest.mark.huge
@pytest.mark.parametrize(
    ("name", "size", "copies"),
    [
        ("layer_norm", {"shape": (1, 8192)}, 2**18 + 3),
        ("bias_gelu", {"shape": (1, 8192)}, 2**18 + 3),
        ("unshuffle", {"N": 1, "L": 196, "K": 49, "D": 1024}, 10_700),
        ("attention", {"N": 1, "T": 12, "h": 96, "d": 43}, 14_600),
    ],
)
def test_forward_of_more_than_2_31_elements(native, name, size, copies):
    """Samples that are one and the same in memory: every output is that of the first."""
    case = Case(SPECS[name], "bf16", size)
    inputs = {leaf: t.detach() for leaf, t in case.make().items()}
    expected = case.op(**inputs)[0]
    repeated = {
        leaf: inputs[leaf].expand(copies, *inputs[leaf].shape[1:]) for leaf in ("x", "qkv", "ids_restore") if leaf in inputs
    }
    out = case.op(**inputs | repeated)
    assert max(t.numel() for t in (out, *repeated.values())) > 2**31
    for n in (0, copies // 2, copies - 1):
        assert torch.equal(out[n], expected)
