"""Overridden methods get the official arguments; what they cannot honour raises."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from support import assert_equal, images_for, noise_for, small_mae
from torch import Tensor

import maefast
from maefast import MAE

OFFICIAL_ARGUMENTS = {
    "forward_encoder": ("imgs", "mask_ratio"),
    "random_masking": ("x", "mask_ratio"),
    "forward_decoder": ("x", "ids_restore"),
    "forward_loss": ("imgs", "pred", "mask"),
    "patchify": ("imgs",),
}
RESULTS: dict[str, Callable[[object], object]] = {  # what the override gives instead
    "forward_encoder": lambda out: (out[0] + 1.0, out[1], out[2]),
    "random_masking": lambda out: (out[0] * 2.0, out[1], out[2]),
    "forward_decoder": lambda out: out * 0.0 + 3.0,
    "forward_loss": lambda out: out * 5.0,
    "patchify": lambda out: out * 0.0,
}
REFUSED = {  # argument -> the overrides that cannot honour it
    "noise": ("forward_encoder", "random_masking"),
    "mask": ("forward_encoder", "random_masking"),
    "return_pred": ("forward_decoder", "forward_loss", "patchify"),
}


class Recorder:
    """An override that notes its arguments and changes what the official method gives."""

    def __init__(self, name: str):
        self.name, self.calls = name, []

    def __call__(self, model: MAE, *args: object, **kwargs: object) -> object:
        self.calls.append((args, kwargs))
        return RESULTS[self.name](getattr(MAE, self.name)(model, *args, **kwargs))


def make(name: str, place: str, **options: object) -> tuple[MAE, Recorder]:
    recorder = Recorder(name)
    if place == "subclass":
        return small_mae(type("Custom", (MAE,), {name: lambda *args, **kwargs: recorder(*args, **kwargs)}), **options), recorder
    model = small_mae(**options)
    setattr(model, name, partial(recorder, model))
    return model, recorder


def by_official_route(name: str, model: MAE, imgs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The official forward with the override, in plain torch on the untouched methods."""
    change = RESULTS[name]
    x = model.patch_embed(imgs) + model.pos_embed[:, 1:]
    kept, mask, ids_restore = MAE.random_masking(model, x, 0.5)
    if name == "random_masking":
        kept = change((kept, mask, ids_restore))[0]
    latent = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(len(imgs), -1, -1), kept], dim=1)
    for block in model.blocks:
        latent = block(latent)
    latent = model.norm(latent)
    if name == "forward_encoder":
        latent = change((latent, mask, ids_restore))[0]
    pred = MAE.forward_decoder(model, latent, ids_restore)
    if name == "forward_decoder":
        pred = change(pred)
    target = MAE.patchify(model, imgs)
    if name == "patchify":
        target = change(target)
    if model.norm_pix_loss:
        target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    loss = (((pred - target) ** 2).mean(dim=-1) * mask).sum() / mask.sum()
    return change(loss) if name == "forward_loss" else loss, pred, mask


def grads_of(model: MAE, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), materialize_grads=True), strict=True))


@pytest.mark.parametrize("norm_pix_loss", [True, False], ids=["norm_pix", "pixels"])
@pytest.mark.parametrize("place", ["subclass", "instance"])
@pytest.mark.parametrize("name", OFFICIAL_ARGUMENTS)
def test_called_once_with_the_official_arguments_and_used(name, place, norm_pix_loss):
    model, recorder = make(name, place, norm_pix_loss=norm_pix_loss)
    imgs = images_for(model, N=3)
    torch.manual_seed(8)
    expected = by_official_route(name, model, imgs)
    recorder.calls.clear()
    torch.manual_seed(8)
    got = model(imgs, 0.5)
    ((args, kwargs),) = recorder.calls
    assert not kwargs
    assert len(args) == len(OFFICIAL_ARGUMENTS[name])
    for argument, value in zip(OFFICIAL_ARGUMENTS[name], args, strict=True):
        if argument == "mask_ratio":
            assert value == 0.5
        if argument == "imgs":
            assert value is imgs
        if argument == "mask":
            assert value is got.mask
        if argument == "x" and name == "random_masking":
            torch.testing.assert_close(value, model.patch_embed(imgs) + model.pos_embed[:, 1:])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    torch.manual_seed(8)
    assert abs(small_mae(norm_pix_loss=norm_pix_loss)(imgs, 0.5).loss - got.loss) > 1e-4  # the override matters
    torch.testing.assert_close(grads_of(model, got.loss), grads_of(model, expected[0]), rtol=1e-4, atol=1e-6)


def value_of(argument: str, model: MAE) -> Tensor | bool:
    noise = noise_for(model)
    return {"noise": noise, "mask": noise.argsort(dim=1) >= 6, "return_pred": False}[argument]


@pytest.mark.parametrize("place", ["subclass", "instance"])
@pytest.mark.parametrize(("argument", "name"), [(argument, name) for argument, names in REFUSED.items() for name in names])
def test_what_an_override_cannot_honour_raises(argument, name, place):
    model, recorder = make(name, place)
    imgs, value = images_for(model), value_of(argument, model)
    generator = torch.get_rng_state()
    with pytest.raises(RuntimeError, match=rf"{argument}=.*{name}"):
        model(imgs, **{argument: value})
    assert not recorder.calls
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("name", REFUSED["noise"])
def test_arguments_that_exclude_each_other_are_a_value_error(name):
    model, recorder = make(name, "subclass")
    with pytest.raises(ValueError, match="noise and mask both decide what is removed"):
        model(images_for(model), noise=noise_for(model), mask=noise_for(model).argsort(dim=1) >= 6)
    assert not recorder.calls


HONOURED = [("noise", "forward_decoder"), ("mask", "forward_loss"), ("noise", "patchify")]
HONOURED += [("return_pred", "forward_encoder"), ("return_pred", "random_masking")]


@pytest.mark.parametrize(("argument", "name"), HONOURED)
def test_what_an_override_does_not_touch_is_honoured(argument, name):
    model, recorder = make(name, "subclass")
    imgs, value = images_for(model), value_of(argument, model)
    _, pred, mask = model(imgs, **{argument: value})
    assert len(recorder.calls) == 1
    if argument == "mask":
        assert torch.equal(mask, value.float())
    if argument == "noise":
        assert torch.equal(mask, (value.argsort(dim=1).argsort(dim=1) >= 6).float())
    if argument == "return_pred":
        assert pred is None
        recorder.calls.clear()
        torch.manual_seed(0)
        without = model(imgs, return_pred=False).loss
        torch.manual_seed(0)
        torch.testing.assert_close(without, model(imgs).loss, rtol=1e-6, atol=0)


def test_an_override_of_the_model_gives_uint8_pixels_to_patchify_as_floats():
    model, recorder = make("patchify", "subclass")
    imgs = images_for(model, dtype=torch.uint8)
    model(imgs)
    ((pixels,), _) = recorder.calls[0]
    expected = (imgs.double() / 255 - model.mean.double()[:, None, None]) / model.std.double()[:, None, None]
    torch.testing.assert_close(pixels, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OFFICIAL_ARGUMENTS)
def test_explain_names_overrides(name, capsys):
    maefast.explain(small_mae())
    assert "MAE.forward takes the fused path" in capsys.readouterr().out
    model, _ = make(name, "instance")
    maefast.explain(model)
    line = capsys.readouterr().out.splitlines()[-1]
    assert "official route" in line
    assert [other for other in OFFICIAL_ARGUMENTS if other in line] == [name]
    assert model.overridden_methods() == (name,)


def test_an_override_that_is_taken_back():
    model, recorder = make("forward_loss", "instance")
    imgs, noise = images_for(model), noise_for(model)
    changed = model(imgs, noise=noise).loss
    del model.forward_loss
    assert torch.equal(model(imgs, noise=noise).loss * 5, changed)
    assert len(recorder.calls) == 1
    assert model.overridden_methods() == ()


@pytest.mark.parametrize("name", ["random_masking", "forward_loss"])
def test_in_compiled_code(name, fresh_dynamo):
    def method(model: MAE, *args: object) -> object:
        return RESULTS[name](getattr(MAE, name)(model, *args))

    model = small_mae(type("Custom", (MAE,), {name: method}), depth=1)
    imgs, runs = images_for(model), []
    for m in (torch.compile(model, fullgraph=True, backend="aot_eager"), model):
        torch.manual_seed(8)
        loss = m(imgs, 0.5).loss
        runs.append([loss, *grads_of(model, loss).values()])
    assert_equal(*runs)
    torch.manual_seed(8)
    assert abs(small_mae(depth=1)(imgs, 0.5).loss - runs[0][0]) > 1e-4
