"""What torch offers around any module works on a MAE, with the numbers of the plain call."""

import copy
import io
import pickle
from functools import partial

import pytest
import support
import torch
from support import (
    BATCHES,
    IMAGES,
    assert_equal,
    assert_results,
    assert_steps,
    images_for,
    noise_for,
    small_mae,
    small_reference,
    step,
)
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as activation

from maefast import MAE
from maefast.blocks import Block
from maefast.ops import _tokens
from maefast.ops._tokens import take_tokens
from maefast.testing.errors import assert_close_to_float64

KINDS = ("forward_pre", "forward", "full_backward_pre", "full_backward")  # of hooks
OPTIONS = pytest.mark.parametrize("options", [{}, {"return_pred": False}], ids=["pred", "no_pred"])


@pytest.fixture(autouse=True)
def _repeated_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models take every path that large ones take."""
    monkeypatch.setattr(_tokens, "REPEATED_VALUES", 0)


def make(seed: int = 0) -> MAE:
    return small_mae(seed=seed, decoder_depth=2)


def run(model: nn.Module, **options: object) -> support.Results:
    return step(model, images_for(model), noise_for(model), **options)


def check_steps(model: nn.Module, **options: object) -> None:
    """Hold several batches to the error rule, under the names that checkpointing hides."""
    reference = small_reference(decoder_depth=2)

    def run(imgs: Tensor, noise: Tensor) -> support.Results:
        results = step(model, imgs, noise, **options)
        return {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in results.items()}

    assert_steps(run, reference, left_out={"pred"} if options else set())


@OPTIONS
def test_functional_call(options):
    """Parameters from elsewhere are used and have the gradients; the model's own have none."""
    model, other = make(), make(seed=1)
    expected = run(other, **options)
    parameters = {name: p.detach().requires_grad_(p.requires_grad) for name, p in other.named_parameters()}
    kwargs = {"noise": noise_for(model), **options}
    loss = torch.func.functional_call(model, parameters, (images_for(model),), kwargs).loss
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    got = {"loss": loss, **dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))}
    assert_equal(got, {name: expected[name] for name in got})
    assert all(p.grad is None for p in model.parameters())


def saved(model: MAE) -> MAE:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved])
def test_copies_are_the_same_model(duplicate):
    model = make()
    other = duplicate(model)
    got = run(other)
    assert all(p.grad is None for p in model.parameters())
    assert_equal(got, run(model))


@OPTIONS
@pytest.mark.parametrize("impl", activation.CheckpointImpl)
def test_checkpointed_blocks(impl, options):
    """torch's wrapper, reentrant or not, on every block; return_pred takes it off the last."""
    model = make()
    wrapper = partial(activation.checkpoint_wrapper, checkpoint_impl=impl)
    activation.apply_activation_checkpointing(model, wrapper, check_fn=lambda module: isinstance(module, Block))
    check_steps(model, **options)


@OPTIONS
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # images have no gradient
def test_hooks_are_called_on_every_module(options):
    model, seen = make(), []
    modules = [module for module in model.modules() if not isinstance(module, nn.ModuleList)]
    for module in modules:
        for kind in KINDS:
            getattr(module, f"register_{kind}_hook")(lambda module, *args, kind=kind: seen.append((id(module), kind)))
    run(model, **options)
    assert sorted(seen) == sorted((id(module), kind) for module in modules for kind in KINDS)
    check_steps(model, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=["fp32", "uint8"])
def test_a_hooked_convolution_is_called_with_the_patches_asked_for(dtype):
    model, reference = make(), small_reference(decoder_depth=2)
    imgs, ids = images_for(model, N=4, dtype=dtype), noise_for(model, N=4).argsort(dim=1)[:, :5]
    statistics = (model.mean, model.std) if dtype == torch.uint8 else ()
    model.patch_embed.proj.register_forward_hook(lambda module, args, out: out * 2)
    pixels = support.widened(imgs, *statistics)
    exact = 2 * take_tokens(copy.deepcopy(reference.patch_embed).double()(pixels), ids)
    eager = 2 * take_tokens(reference.patch_embed(pixels.float()), ids)
    assert_close_to_float64("tokens", model.patch_embed(imgs, ids, *statistics), eager, exact)
    assert model.patch_embed(imgs[:0], ids[:0], *statistics).shape == (0, 5, 32)


def inference(model: nn.Module, imgs: Tensor, noise: Tensor) -> support.Results:
    """The outputs of a model or of the reference, and the features of the whole images."""
    loss, pred, _ = model(imgs, noise=noise)
    if isinstance(model, MAE):
        return {"loss": loss, "pred": pred, "alone": model(imgs, noise=noise, return_pred=False).loss, "x": model.encode(imgs)}
    in_order = torch.linspace(0, 1, noise.shape[1]).expand(noise.shape)
    return {"loss": loss, "pred": pred, "alone": loss, "x": model.forward_encoder(imgs, 0.0, in_order)[0]}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, partial(torch.set_grad_enabled, False)])
@pytest.mark.parametrize("cast", [False, True], ids=["fp32", "autocast"])
def test_without_gradients(context, cast):
    model, reference = make(), small_reference(decoder_depth=2)
    other, exact = support.attends_otherwise(reference), copy.deepcopy(reference).double()

    def run(seed: int) -> support.Batch:
        imgs, noise = images_for(model, IMAGES, seed=seed), noise_for(model, IMAGES, seed=seed)
        with context():
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                got, *eager = (inference(m, imgs, noise) for m in (model, reference, other))
            assert not any(value.requires_grad for value in got.values())
            return got, eager, inference(exact, imgs.double(), noise)

    assert_results(map(run, range(BATCHES)))
