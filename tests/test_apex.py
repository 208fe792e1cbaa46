"""NVIDIA's apex: its optimizer, its layer norm, and errors where they cannot run.

Packages with its module layout, whose kernels are torch's, stand in for it.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import images_for, noise_for, set_fact, small_mae
from test_dispatch import run_python
from torch import Tensor

import maefast
from maefast import _apex, dispatch, ops, request
from maefast.train.optim import adamw, parameter_groups
from maefast.train.step import training_step

NVIDIA = {
    "apex/__init__.py": "",
    "apex/optimizers/__init__.py": """
import torch

class FusedAdam(torch.optim.AdamW):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=False, weight_decay=0.0,
                 amsgrad=False, set_grad_none=True, capturable=False):
        assert adam_w_mode and not capturable
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def zero_grad(self):  # takes no argument, unlike torch's
        super().zero_grad(set_to_none=True)
""",
    "apex/normalization/__init__.py": "",
    "apex/normalization/fused_layer_norm.py": """
import torch

calls = []

def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    calls.append(input.dtype)
    return torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)
""",
    "amp_C.py": "",
    "fused_layer_norm_cuda.py": "",
}
UNRELATED = {"apex/__init__.py": "raise AssertionError('imported to see what it is')", "apex/models.py": ""}


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put files of a package apex on the path, and remove them after the test."""
    yield lambda files: monkeypatch.syspath_prepend(write(tmp_path, files))
    for name in [name for name in sys.modules if name.split(".")[0] in ("apex", "amp_C", "fused_layer_norm_cuda")]:
        del sys.modules[name]


class OnGpu(torch.Tensor):
    is_cuda = True  # it only says so


def parameter(*shape: int) -> Tensor:
    return torch.Tensor._make_subclass(OnGpu, torch.randn(shape), True)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "NVIDIA's apex is not installed .*the package named apex on PyPI is an unrelated one"),
        (UNRELATED, "the apex that is installed is not NVIDIA's .*it has no module apex.optimizers"),
        ({"apex.py": "", "optimizers.py": ""}, "the apex that is installed is not NVIDIA's .*it has no module apex.optimizers"),
        ({k: v for k, v in NVIDIA.items() if k != "amp_C.py"}, "NVIDIA's apex was built without its CUDA extension amp_C"),
    ],
    ids=["none", "unrelated", "a single module", "without CUDA"],
)
def test_where_apex_is_not_nvidia_s(install, files, reason):
    install(files)
    with pytest.raises(RuntimeError, match=f"adamw cannot run on the requested backend 'apex': {reason}"):
        adamw([parameter(3)], 0.1, backend="apex")
    assert type(adamw([parameter(3)], 0.1)) is torch.optim.AdamW


def test_apex_s_optimizer_is_for_cuda(install):
    install(NVIDIA)
    assert _apex.why_not("optimizers", "amp_C") is None
    on_cpu, on_gpu = torch.nn.Parameter(torch.ones(2)), parameter(2)
    for params in ([on_gpu, on_cpu], [{"params": [on_gpu]}, {"params": [on_cpu]}], torch.nn.Linear(2, 2)):
        assert type(adamw(params, 0.1)) is torch.optim.AdamW
        with pytest.raises(RuntimeError, match="takes parameters on CUDA, one is on cpu"):
            adamw(params, 0.1, backend="apex")
    assert type(adamw([on_gpu], 0.1)).__name__ == "FusedAdam"
    for options in ({"backend": "torch"}, {"capturable": True}):
        assert type(adamw([on_gpu], 0.1, **options)) is torch.optim.AdamW
    with pytest.raises(RuntimeError, match="capturable is for torch's AdamW"):
        adamw([on_gpu], 0.1, capturable=True, backend="apex")


def test_apex_s_optimizer_gets_every_option(install):
    """Three steps with it are three with torch's."""
    install(NVIDIA)
    start, gradient = torch.randn(4, 3), torch.randn(3, 4, 3)
    ends = []
    for backend in ("apex", "torch"):
        p = torch.Tensor._make_subclass(OnGpu, start.clone(), True)
        optimizer = adamw([{"params": [p]}], 0.1, (0.8, 0.9), 0.3, 1e-3, backend=backend)
        for grad in gradient:
            p.grad = grad
            optimizer.step()
        ends.append(p.detach().as_subclass(Tensor))
    assert torch.allclose(*ends, rtol=1e-6)
    assert not torch.allclose(ends[0], start, atol=0.1)


def test_a_training_step_takes_apex_s_optimizer(install):
    install(NVIDIA)
    from apex.optimizers import FusedAdam

    losses = []
    for make in (lambda groups: FusedAdam(groups, 0.01, adam_w_mode=True), lambda groups: adamw(groups, 0.01, (0.9, 0.999))):
        model = small_mae()
        optimizer = make(parameter_groups(model, 0.05))
        losses.append([training_step(model, optimizer, images_for(model), noise=noise_for(model)).item() for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_unknown_optimizer_backend():
    with pytest.raises(ValueError, match="backend must be one of auto, apex, torch; it is 'fused'"):
        adamw([parameter(3)], 0.1, backend="fused")


def test_layer_norm_asks_for_nvidia_s(tmp_path):
    """The unrelated package is not imported; NVIDIA's is, and says that it needs a GPU."""
    code = "import torch, maefast; maefast.ops.layer_norm(torch.ones(2, 3), torch.ones(3), torch.ones(3))"
    for files, expected in (
        (UNRELATED, "CannotRunError: MAEFAST_BACKEND asks for apex: the apex that is installed is not NVIDIA's"),
        (NVIDIA, "layer_norm cannot run on the requested backend 'apex': apex layer_norm runs on a GPU, x is on cpu"),
    ):
        path = f"{write(tmp_path / str(len(files)), files)}:{Path(maefast.__file__).parent.parent}"
        done = run_python(code, MAEFAST_BACKEND="apex", PYTHONPATH=path)
        assert done.returncode != 0
        assert expected in done.stderr


def test_what_apex_s_layer_norm_takes(monkeypatch):
    set_fact(monkeypatch, request, "_NO_APEX", None)

    def why(name: str = "layer_norm", **changed: torch.dtype) -> str | None:
        op = dispatch.OPS[name]
        ask = op.example(torch.device("cuda"), torch.float32)._replace(**changed)
        assert dispatch.choose(op, ask) != "apex", "auto leaves it alone: no measurement shows it faster"
        return dispatch.why_not(op, "apex", ask)

    assert why(out=torch.bfloat16) is None
    assert why("bias_gelu") == "there is no apex kernel of bias_gelu"
    assert "tensors of one dtype, they are" in why(weight=torch.bfloat16)
    assert "takes float32, bfloat16, float16, x is float64" in why(x=torch.float64)


def test_blocks_run_apex_s_layer_norm_for_those_who_ask(install, monkeypatch):
    install(NVIDIA)
    set_fact(monkeypatch, request, "_NO_APEX", None)
    norm = dispatch.OPS["layer_norm"]
    on_any_device = tuple(replace(kernel, devices=()) if kernel.backend == "apex" else kernel for kernel in norm.kernels)
    monkeypatch.setitem(norm.__dict__, "kernels", on_any_device)
    request.forget()
    model = small_mae()
    with maefast.backend("apex"):
        loss = model(images_for(model), noise=noise_for(model)).loss
        y = ops.layer_norm(torch.ones(2, 4).cumsum(1), torch.ones(4), torch.zeros(4), dtype=torch.bfloat16)
    from apex.normalization.fused_layer_norm import calls

    assert len(calls) == 2 + 1, "the first norm of each stack, before which nothing is added, and this one"
    assert y.dtype == torch.bfloat16
    with maefast.backend("eager"):
        assert loss.item() == pytest.approx(model(images_for(model), noise=noise_for(model)).loss.item(), rel=1e-5)
