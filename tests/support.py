"""What test files share: awkward layouts, ops against float64, small models, refused commands."""

import copy
import ctypes
import mmap
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import maefast
from maefast import _library, cli, gpu, reference
from maefast.request import forget
from maefast.testing.errors import assert_close_to_float64

NATIVE = _library.HAS_NATIVE
TRANSFORMER_BLOCK = sys.modules["maefast.ops.transformer_block"]  # whose name in maefast.ops is that of the op
if NATIVE:
    from maefast import _C

BACKENDS = ("native", "eager") if NATIVE else ("eager",)
ISAS = ("scalar", "avx2", "avx512", "avx512bf16")
# What the native kernels of this process may use: no wider than the CPU, nor than MAEFAST_CPU_ISA.
USABLE_ISAS = ISAS[: ISAS.index(_C.cpu_isa()) + 1] if NATIVE else ()
ON_INTEL = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
THREADS = (2, 5)  # against one; five are more than the cores of a small machine, and no divisor of anything
Op = Callable[..., Tensor]
Results = dict[str, Tensor]
Batch = tuple[Results, Sequence[Results], Results]  # what is tested, eager runs, exact


def set_fact(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, value: object) -> None:
    """Change what a machine has for the rest of a test, and forget decisions."""
    monkeypatch.setattr(owner, name, value)
    forget()


def pretend_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend a build with CUDA kernels and an H100, to all that dispatch can tell."""
    facts = {"capability": lambda device: (9, 0), "shared_memory": lambda device: 227 << 10}
    for owner, changed in ((_library, {"HAS_NATIVE": True, "HAS_CUDA": True}), (gpu, facts)):
        for name, value in changed.items():
            set_fact(monkeypatch, owner, name, value)


def multiplies(dtype: torch.dtype) -> bool:
    """Return whether `auto` takes maefast's own GEMM of `dtype` here: DESIGN.md, section 4."""
    return {torch.float32: "avx512", torch.bfloat16: "avx512bf16"}.get(dtype) in USABLE_ISAS and not ON_INTEL


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must exit with 2 and one line on stderr, and return that line."""
    try:
        code = cli.main(arguments)
    except SystemExit as stop:  # argparse's way
        code = stop.code
    streams = capsys.readouterr()
    assert (code, streams.out, streams.err.count("\n")) == (2, "", 1), streams
    return streams.err


class Calls(TorchDispatchMode):
    """The native ops that run within the `with` block, in order; or those of another namespace."""

    def __init__(self, namespace: str = "maefast"):
        super().__init__()
        self.namespace, self.names = namespace, list[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == self.namespace:
            self.names.append(func._schema.name.removeprefix(f"{self.namespace}::"))
        return func(*args, **(kwargs or {}))


def _poison(tensor: Tensor) -> Tensor:
    return tensor.fill_(torch.nan if tensor.dtype.is_floating_point else 113)


def misaligned(t: Tensor) -> Tensor:
    """Return a copy that starts one element after an aligned address."""
    return _poison(t.new_empty(t.numel() + 2))[1:-1].view(t.shape).copy_(t)


def padded(t: Tensor) -> Tensor:
    """Return a copy in rows that are dense but apart, with poison between them."""
    return _poison(t.new_empty(*t.shape[:-1], t.shape[-1] + 5))[..., 3:-2].copy_(t)


def sliced(t: Tensor) -> Tensor:
    """Return a copy with every stride doubled, and poison between the values."""
    return _poison(t.new_empty([2 * size for size in t.shape]))[(slice(1, None, 2),) * t.dim()].copy_(t)


def transposed(t: Tensor) -> Tensor:
    """Return a copy with the last two dimensions swapped in memory."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


LAYOUTS = {"misaligned": misaligned, "padded": padded, "sliced": sliced, "transposed": transposed}
IMAGE_LAYOUTS = LAYOUTS | {"channels_last": channels_last}


def lay_out(layout: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """`t` in another layout, with the same values and the same need of a gradient."""
    out = layout(t.detach()).requires_grad_(t.requires_grad)
    assert torch.equal(out, t)
    return out


def permutations(N: int, L: int) -> Tensor:
    return torch.rand(N, L).argsort(dim=1)


def removed_mask(N: int, L: int, len_keep: int) -> Tensor:
    return (permutations(N, L) >= len_keep).float()


def widened(imgs: Tensor, mean: Tensor | None = None, std: Tensor | None = None) -> Tensor:
    """The pixels in float64; uint8 ones by the formula (x/255 - mean)/std."""
    pixels = imgs.detach().double()
    if imgs.dtype != torch.uint8:
        return pixels
    pixels = pixels / 255
    return pixels if mean is None else (pixels - mean.double()[:, None, None]) / std.double()[:, None, None]


def forward_backward(op: Op, inputs: dict[str, Tensor], dy: Tensor | None) -> dict[str, Tensor]:
    """The output of op(**inputs), and the gradient of each leaf that needs one as d_<name>."""
    leaves = {name: t for name, t in inputs.items() if t.requires_grad}
    out = op(**inputs)
    if not leaves:
        return {"out": out}
    grads = torch.autograd.grad(out, list(leaves.values()), None if dy is None else dy.to(out.dtype))
    return {"out": out.detach()} | {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def assert_equal(got: object, expected: object) -> None:
    """Hold tensors to the same values and dtypes: one, or several in a sequence or by name."""
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def assert_once_differentiable(op: Op, inputs: dict[str, Tensor]) -> None:
    """A backward may run twice on one graph, with equal results. A second derivative raises."""
    leaves = [t for t in inputs.values() if t.requires_grad]
    loss = op(**inputs).square().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, leaves, retain_graph=True), strict=True):
        assert torch.equal(a, b)
    grad, *_ = torch.autograd.grad(loss, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def assert_same_for_any_threads(run: Callable[[], dict[str, Tensor]]) -> None:
    """Hold that one thread and several, twice each, give equal bits."""
    with threads(1):
        one = run()
    for count in THREADS:
        with threads(count):
            for result in (run(), run()):
                assert result.keys() == one.keys()
                for name, value in result.items():
                    assert torch.equal(value, one[name]), f"{name} with {count} threads"


def check_op(
    op: Op,
    cases: list[dict[str, Tensor]],
    exact: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    dy: Callable[[Tensor], Tensor] | None = None,
    layout: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda inputs: inputs,
    tested: str = "native",
) -> None:
    """Hold forward and gradients of a backend to the error rule, beside eager and float64.

    The results of all `cases` (inputs of one shape) are one tensor. `exact` makes float64 inputs,
    `dy` the incoming gradient (also of a scalar, where None would be 1). `layout` changes how the
    tested inputs lie in memory.
    """
    results: dict[str, list[dict[str, Tensor]]] = {tested: [], "eager": [], "exact": []}
    for inputs in cases:
        wide = {name: t.detach().requires_grad_(inputs[name].requires_grad) for name, t in exact(inputs).items()}
        incoming = None if dy is None else dy(op(**wide).detach())
        for backend in (tested, "eager"):
            with maefast.backend(backend):
                results[backend].append(forward_backward(op, layout(inputs) if backend == tested else inputs, incoming))
        results["exact"].append(forward_backward(op, wide, incoming))
    for name in results["exact"][0]:
        got, eager, truth = (torch.stack([case[name] for case in results[key]]) for key in (tested, "eager", "exact"))
        assert got.dtype == eager.dtype, f"{name}: {tested} gives {got.dtype}, eager {eager.dtype}"
        assert_close_to_float64(name, got, eager, truth)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill all allocations within the block with 0x7f: 3e38 as fp32 or bf16, a bad index.

    AddressSanitizer ignores mallopt; `make test-sanitize` has its own options. torch's wheels for
    aarch64 allocate with mimalloc, which cannot do it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc
    if mallopt is None or platform.machine() == "aarch64":
        yield
        return
    m_perturb, inverted = -6, 0x80
    mallopt(m_perturb, inverted)
    try:
        assert (torch.empty(100_000).view(torch.uint8) == 0x7F).all()
        yield
    finally:
        mallopt(m_perturb, 0)


def at_the_edge(t: Tensor, end: bool) -> Tensor:
    """Return a copy with a page without access behind its last value, or before its first."""
    page, size = mmap.PAGESIZE, t.nbytes
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    no_access = 0
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start + pages * page * end), ctypes.c_size_t(page), no_access):
        raise OSError(ctypes.get_errno(), "mprotect")
    view = memoryview(memory)[pages * page - size : pages * page] if end else memoryview(memory)[page : page + size]
    order = sorted(range(t.dim()), key=lambda dim: (-t.stride(dim), dim))  # from the outermost in memory to the innermost
    dense = t.permute(*order)
    out = torch.frombuffer(view, dtype=t.dtype).view(dense.shape)
    return out.copy_(dense).permute(*sorted(range(t.dim()), key=order.__getitem__))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


SIZES = {"tiny": (192, 12, 3, 16), "small": (384, 12, 6, 16), "base": (768, 12, 12, 16)}
SIZES |= {"large": (1024, 24, 16, 16), "huge": (1280, 32, 16, 14)}  # embed_dim, depth, num_heads, patch_size
SMALL = {"img_size": (64, 48), "patch_size": (8, 16), "in_chans": 3, "embed_dim": 32, "depth": 2, "num_heads": 4}
SMALL |= {"decoder_embed_dim": 24, "decoder_depth": 1, "decoder_num_heads": 3}
SMALL |= {"norm_layer": partial(nn.LayerNorm, eps=1e-6), "norm_pix_loss": True}


def small_mae(cls: type[maefast.MAE] = maefast.MAE, seed: int = 0, **options: object) -> maefast.MAE:
    torch.manual_seed(seed)
    return cls(**{**SMALL, **options})


def small_reference(seed: int = 0, **options: object) -> reference.ReferenceMAE:
    torch.manual_seed(seed)
    return reference.ReferenceMAE(**{**SMALL, **options})


def images_for(model: nn.Module, N: int = 2, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """Random images of the size that the model takes."""
    generator = torch.Generator().manual_seed(seed)
    shape = (N, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    if dtype == torch.uint8:
        return torch.randint(256, shape, dtype=dtype, generator=generator)
    return torch.randn(shape, generator=generator).to(dtype)


def noise_for(model: nn.Module, N: int = 2, seed: int = 2) -> Tensor:
    return torch.rand(N, model.patch_embed.num_patches, generator=torch.Generator().manual_seed(seed))


def step(model: nn.Module, imgs: Tensor, noise: Tensor, mode: str = "fp32", in_place: bool = False, **options: object) -> Results:
    """loss, pred, mask and every parameter's gradient; pure bf16 has model and images in bf16."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else nullcontext():
        loss, pred, mask = model(imgs, noise=noise, **options)
    if in_place:
        loss /= 2
    loss.backward()
    results = {"loss": loss.detach(), "mask": mask} | ({} if pred is None else {"pred": pred.detach()})
    return results | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def stacked(runs: Sequence[Results]) -> Results:
    assert all(run.keys() == runs[0].keys() for run in runs)
    return {name: torch.stack([run[name] for run in runs]) for name in runs[0]}


# The few roundings of one small batch may sum to near zero in the eager run. So many batches of so
# many images, or the larger error of two eager runs, are a yardstick that no correct result misses.
BATCHES = IMAGES = 16


def attends_otherwise(plain: nn.Module) -> nn.Module:
    """Return a copy with the reference's other attention: the same function, rounded elsewhere."""
    other = copy.deepcopy(plain)
    for module in other.modules():
        if isinstance(module, reference.Attention):
            module.attention = {"sdpa": "math", "math": "sdpa"}[module.attention]
    return other


def assert_results(batches: Iterable[Batch], what: str = "", left_out: Set[str] = frozenset()) -> None:
    """Hold the results of several batches to the error rule, each name as one tensor.

    Masks and ids must be equal. The larger error of the eager runs counts. Results `left_out` must
    be absent from what is tested.
    """
    got, eager, exact = zip(*batches, strict=True)
    mine, truth, runs = stacked(got), stacked(exact), [stacked(run) for run in zip(*eager, strict=True)]
    assert truth.keys() - mine.keys() == left_out
    for name, value in mine.items():
        if name in ("mask", "ids"):
            assert all(torch.equal(value, run[name]) for run in runs), name
        else:
            assert all(value.dtype == run[name].dtype for run in runs), name
            assert_close_to_float64(f"{what}{name}", value, [run[name] for run in runs], truth[name])


def assert_steps(run: Callable[[Tensor, Tensor], Results], reference: nn.Module, left_out: Set[str]) -> None:
    """Hold run(imgs, noise), a step on the reference's weights, to the error rule."""
    other, exact = attends_otherwise(reference), copy.deepcopy(reference).double()

    def batch(seed: int) -> Batch:
        imgs, noise = images_for(reference, IMAGES, seed=seed), noise_for(reference, IMAGES, seed=seed)
        return run(imgs, noise), [step(model, imgs, noise) for model in (reference, other)], step(exact, imgs.double(), noise)

    assert_results(map(batch, range(BATCHES)), left_out=left_out)
