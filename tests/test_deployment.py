"""Quantisation, traces and ONNX: what works on a model, and errors that name the way out."""

import copy

import pytest
import torch
from support import images_for, noise_for, small_mae
from torch import Tensor, nn

import maefast
from maefast import MAE, VisionTransformer

ENCODER = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}


class Encoder(nn.Module):
    def __init__(self, model: MAE):
        super().__init__()
        self.model = model

    def forward(self, imgs: Tensor) -> Tensor:
        return self.model.encode(imgs)


class PreTraining(Encoder):
    def forward(self, imgs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        loss, pred, _ = self.model(imgs, noise=noise)
        return loss, pred


def classifier() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(**ENCODER, num_classes=5).eval()


@pytest.mark.parametrize("make", [classifier, lambda: Encoder(small_mae())], ids=["classifier", "encoder"])
@pytest.mark.filterwarnings("ignore:torch.ao.quantization", "ignore:torch.quantize_per_tensor")
def test_quantize_dynamic_finds_every_linear(make):
    model = make().eval()
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    torch.backends.quantized.engine = torch.backends.quantized.supported_engines[-1]
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    found = [name for name, module in quantised.named_modules() if isinstance(module, torch.ao.nn.quantized.dynamic.Linear)]
    assert found == linears
    imgs = images_for(getattr(model, "model", model))
    expected, got = model(imgs), quantised(imgs)
    assert 0 < (got - expected).norm() / expected.norm() < 0.1  # rounded to 8 bits, and the same model


class Scaled(Tensor):
    """A weight that multiplies by its own rule, as torchao's do: twice the plain product."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        plain = [arg.as_subclass(Tensor) if isinstance(arg, Scaled) else arg for arg in args]
        if func is nn.functional.linear:
            cls.calls += 1
            x, weight, *bias = plain
            return nn.functional.linear(x, 2 * weight, *bias, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def test_weights_of_a_subclass_multiply_by_their_own_rule():
    model = classifier()
    doubled, scaled = copy.deepcopy(model), copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            doubled.get_submodule(name).weight.data.mul_(2)
            weight = module.weight.detach().clone().as_subclass(Scaled)
            scaled.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    imgs, before = images_for(model), Scaled.calls
    with torch.no_grad():
        torch.testing.assert_close(scaled(imgs), doubled(imgs), rtol=1e-4, atol=1e-5)
    assert Scaled.calls - before == 9


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", ["classifier", "encoder", "pre-training"])
def test_a_trace_within_the_eager_backend(tmp_path, kind):
    """Any batch, saved and loaded."""
    mae = small_mae().eval()
    model = {"classifier": classifier(), "encoder": Encoder(mae), "pre-training": PreTraining(mae)}[kind].eval()
    source = getattr(model, "model", model)

    def inputs(N: int) -> tuple[Tensor, ...]:
        return (images_for(source, N=N), noise_for(source, N=N))[: 2 if kind == "pre-training" else 1]

    with maefast.backend("eager"):
        torch.jit.trace(model, inputs(2)).save(str(tmp_path / "trace.pt"))
        traced = torch.jit.load(str(tmp_path / "trace.pt"))
        for N in (2, 5):
            for got, expected in zip(as_tuple(traced(*inputs(N))), as_tuple(model(*inputs(N))), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def as_tuple(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("make", [classifier, lambda: Encoder(small_mae())], ids=["VisionTransformer", "MAE"])
def test_a_trace_of_native_ops_names_the_way_out(make, grad):
    model = make()
    source = getattr(model, "model", model)
    message = rf"a traced graph has no place for the native ops of {type(source).__name__}: call torch.jit.trace within "
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=message + r"maefast.backend\(\"eager\"\), or use torch"):
        torch.jit.trace(model, (images_for(source),))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False], ids=["torch.export", "tracing"])
def test_onnx_within_the_eager_backend(tmp_path, dynamo):
    onnx_reference = pytest.importorskip("onnx.reference", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model, path = classifier(), tmp_path / "model.onnx"
    batch = {"dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},)} if dynamo else {"dynamic_axes": {"imgs": {0: "N"}}}
    with maefast.backend("eager"), torch.no_grad():
        torch.onnx.export(model, (images_for(model, N=4),), path, input_names=["imgs"], dynamo=dynamo, **batch)
    imgs = images_for(model, N=3)
    (got,) = onnx_reference.ReferenceEvaluator(str(path)).run(None, {"imgs": imgs.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got), model(imgs), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False], ids=["torch.export", "tracing"])
def test_onnx_of_native_ops_names_the_way_out(tmp_path, dynamo):
    if dynamo:
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model, path = classifier(), tmp_path / "model.onnx"
    message = r"an ONNX graph has no place for the native ops of VisionTransformer: call torch.onnx.export within maefast.backend"
    with pytest.raises(RuntimeError, match=message), torch.no_grad():
        torch.onnx.export(model, (images_for(model),), path, dynamo=dynamo)
    assert not path.exists()


@pytest.mark.parametrize("strict", [False, True])
def test_export_takes_native_ops(native, strict):
    """The other way out."""
    model = Encoder(small_mae())
    with torch.no_grad():
        program = torch.export.export(model, (images_for(model.model),), strict=strict)
    assert any("maefast" in str(node.target) for node in program.graph.nodes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_explain_without_a_gpu(capsys):
    with pytest.raises(RuntimeError, match=r"^device cuda is not here: torch \S+ has the CPU alone on this machine$"):
        maefast.explain(device="cuda")
    assert capsys.readouterr().out == ""


def test_explain_of_no_device():
    with pytest.raises(ValueError, match=r"^device must be that of a tensor, such as \"cpu\" or \"cuda\"; it is 'gpu'$"):
        maefast.explain(device="gpu")
