"""Other people's checkpoints: layouts found by their tensors, and a choice of models."""

import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import checkpoints
import pytest
import torch
from checkpoints import HEADS, Tensors, assert_loads, assert_same_weights, below, decoder_of, encoder_of, trained
from torch import nn

from maefast import MAE, checkpoint
from maefast.checkpoint import CheckpointError


@pytest.fixture(scope="module")
def model() -> MAE:
    return trained()


TOP = "the top of the file"


class Saved(NamedTuple):
    make: Callable[[Tensors], object]
    source: str = TOP  # where the report says that the weights were
    ignored: tuple[str, ...] = ()
    layout: str = "official"


Make = Callable[[Tensors], Tensors]


def in_state_dict(make: Make, prefixes: str, ignored: tuple[str, ...] = (), layout: str = "official") -> Saved:
    return Saved(lambda t: {"state_dict": make(t)}, f"state_dict, names after {prefixes}", ignored, layout)


def in_two(prefix: str, tensors: Tensors) -> Tensors:
    return below(prefix, encoder_of(tensors)) | below("decoder.", decoder_of(tensors))


mmpretrain, COUNTERS = checkpoints.mmpretrain, {"n_averaged": torch.tensor(3), "initted": torch.tensor(True)}
LAYOUTS = {
    "bare": Saved(lambda t: t),
    "bare beside a number": Saved(lambda t: {**t, "epoch": 3}, ignored=("epoch",)),
    "model": Saved(lambda t: {"model": t, "epoch": 3}, "model", ("epoch",)),
    "another entry": Saved(lambda t: {"net_weights": t}, "net_weights"),
    "model_state_dict": Saved(lambda t: {"model_state_dict": t}, "model_state_dict"),
    "model_ema": Saved(lambda t: {"model_ema": t}, "model_ema"),
    "ema_state_dict": Saved(lambda t: {"ema_state_dict": below("module.", t)}, "ema_state_dict"),
    "deepspeed": Saved(lambda t: {"module": below("module.", t), "global_steps": 3}, "module", ("global_steps",)),
    "composer": Saved(lambda t: {"state": {"model": below("model.", t)}, "rng": []}, "state.model, names after model.", ("rng",)),
    "lightning": Saved(
        lambda t: {"state_dict": below("model.", t), "epoch": 1, "hyper_parameters": {}},
        "state_dict, names after model.",
        ("epoch", "hyper_parameters"),
    ),
    "lightning, with a metric": in_state_dict(
        lambda t: below("net.mae.", t) | {"metric.total": torch.ones(3)}, "net.mae.", ("metric.total",)
    ),
    "lightning, compiled, DDP": in_state_dict(lambda t: below("model._orig_mod.module.", t), "model."),
    "lightly": in_state_dict(checkpoints.lightly, "backbone.vit. and decoder.", ("backbone.mask_token",)),
    "lightly's torchvision": in_state_dict(checkpoints.torchvision, "backbone. and decoder.", layout="torchvision"),
    "encoder and decoder": Saved(partial(in_two, "encoder."), f"{TOP}, names after encoder. and decoder."),
    "solo-learn": in_state_dict(
        lambda t: in_two("backbone.", t) | {"classifier.weight": torch.ones(3, 32)},
        "backbone. and decoder.",
        ("classifier.weight",),
    ),
    "decoder outside": Saved(lambda t: below("encoder.", encoder_of(t)) | decoder_of(t), f"{TOP}, names after encoder."),
    "mmpretrain": Saved(
        lambda t: {"meta": {"epoch": 3}, "state_dict": mmpretrain(t) | {"data_preprocessor.mean": torch.ones(3)}},
        "state_dict, names after backbone. and neck.",
        ("meta", "data_preprocessor.mean"),
        "mmpretrain",
    ),
    "mmpretrain, DDP": in_state_dict(lambda t: below("module.", mmpretrain(t)), "backbone. and neck.", layout="mmpretrain"),
    "blocks compiled": Saved(lambda t: {re.sub(r"(blocks\.\d+)\.", r"\1._orig_mod.", name): x for name, x in t.items()}),
    "fsdp": Saved(checkpoints.fsdp),
    "checkpoint wrappers": Saved(lambda t: {n.replace(".attn.", "._checkpoint_wrapped_module.attn."): x for n, x in t.items()}),
    "counters": Saved(lambda t: {**below("module.", t), **COUNTERS}, ignored=tuple(COUNTERS)),
    "moments": Saved(lambda t: {"model": t, "optimizer": {"exp_avg": {n: x + 1 for n, x in t.items()}}}, "model", ("optimizer",)),
    "the same weights twice": Saved(lambda t: {"model": t, "model_without_ddp": dict(t)}, "model", ("model_without_ddp",)),
    "encoder of the same": Saved(lambda t: {"encoder": encoder_of(t), "model": checkpoints.copy_of(t)}, "model", ("encoder",)),
    "shared tensors": Saved(lambda t: {"model": below("model.", t) | below("alias.", t)}, "model, names after model."),
    "transposed in memory": Saved(lambda t: {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in t.items()}),
    "parameters": Saved(lambda t: {name: nn.Parameter(x) for name, x in t.items()}),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layout(model, tmp_path, case):
    make, source, ignored, layout = LAYOUTS[case]
    torch.save(make(model.state_dict()), tmp_path / "a.pth")
    report = assert_loads(tmp_path / "a.pth", model)
    assert (report.layout, report.source, report.has_decoder) == (layout, source, True)
    assert set(ignored) <= set(report.ignored)
    assert f"taken from: {source}" in str(report).splitlines()
    assert (report.missing, report.unexpected) == ((), ())

    with pytest.warns(UserWarning, match="does not store whether"):
        assert_same_weights(MAE.from_pretrained(tmp_path / "a.pth", **HEADS), model)
    checkpoint.convert(tmp_path / "a.pth", tmp_path / "official.pth", "official")
    assert_same_weights(torch.load(tmp_path / "official.pth", weights_only=True)["model"], model)
    started = trained(seed=2)
    started.init_from(tmp_path / "a.pth")
    assert_same_weights(started, model)


@pytest.mark.parametrize("case", ["lightly", "lightly's torchvision", "mmpretrain", "lightning"])
def test_encoder_alone(model, tmp_path, case):
    tensors = LAYOUTS[case].make(model.state_dict())["state_dict"]
    without = {name: t for name, t in tensors.items() if not re.search("decoder|neck|mask_token", name)}
    torch.save({"state_dict": without}, tmp_path / "a.pth")
    before = trained(seed=1).state_dict()
    assert set(assert_loads(tmp_path / "a.pth", before | encoder_of(model)).missing) == decoder_of(before).keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(model, tmp_path, dtype):
    torch.save({"state_dict": below("model.", {n: t.to(dtype) for n, t in model.state_dict().items()})}, tmp_path / "a.pth")
    assert_loads(tmp_path / "a.pth", {name: t.to(dtype).float() for name, t in model.state_dict().items()})


def test_safetensors_with_metadata_and_a_prefix(model, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    tensors = {name: t.contiguous() for name, t in below("model.", model.state_dict()).items()}
    safetensors.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt", "note": "timm"})
    assert assert_loads(tmp_path, model).source == "the top of the file, names after model."


def test_folders_of_deepspeed(model, tmp_path):
    """The engine's folder, and that of a step; the optimizer's shards are ignored."""
    step = tmp_path / "global_step3"
    step.mkdir()
    (tmp_path / "latest").write_text("global_step3")
    torch.save({"module": model.state_dict(), "ds_config": {}}, step / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {}}, step / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    for folder in (tmp_path, step):
        assert assert_loads(folder, model).source == "module"


def test_checkpoint_file_of_lightning_in_a_folder(model, tmp_path):
    torch.save({"state_dict": below("model.", model.state_dict())}, tmp_path / "epoch=3.ckpt")
    assert_loads(tmp_path, model)


SEVERAL = {
    "entries": (lambda a, b: {"model": a, "model_ema": b}, ("model", "model_ema")),
    "prefixes": (lambda a, b: {"state_dict": below("model.", a) | below("ema.", b)}, ("state_dict.model", "state_dict.ema")),
    "prefixes, the last part": (lambda a, b: {"state_dict": below("model.", a) | below("ema.", b)}, ("model", "ema")),
    "students": (lambda a, b: {"student": below("backbone.", a), "teacher": below("backbone.", b)}, ("student", "teacher")),
    "entry and top": (lambda a, b: {**a, "ema": b}, (".", "ema")),
    "prefix and none": (lambda a, b: a | below("ema_model.", b), (".", "ema_model")),
    "averaging of lucidrains": (
        lambda a, b: below("online_model.", a) | below("ema_model.", b) | COUNTERS | {"step": torch.tensor(3)},
        ("online_model", "ema_model"),
    ),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_several_models_need_a_key(model, tmp_path, case):
    make, keys = SEVERAL[case]
    both = (model.state_dict(), trained(seed=7).state_dict())
    torch.save(make(*both), tmp_path / "a.pth")
    target, values = trained(seed=1), sum(tensor.numel() for tensor in both[0].values())
    message = rf"holds several models; key must name one of .*\({len(both[0])} tensors, {values:,} values, encoder and decoder\)"
    checkpoints.assert_refused(tmp_path / "a.pth", message)
    for key, expected in zip(keys, both, strict=True):
        checkpoint.load(target, tmp_path / "a.pth", key=key)
        assert_same_weights(target, expected)
        trained(seed=2).init_from(tmp_path / "a.pth", key=key)
        with pytest.warns(UserWarning, match="does not store whether"):
            assert_same_weights(MAE.from_pretrained(tmp_path / "a.pth", key=key, **HEADS), expected)
    with pytest.raises(CheckpointError, match=r"key must name weights in .*a.pth, .* tensors.*; it is 'averaged'"):
        checkpoint.load(target, tmp_path / "a.pth", key="averaged")


def test_a_key_of_the_only_model(model, tmp_path):
    torch.save({"state_dict": below("model.", model.state_dict())}, tmp_path / "a.pth")
    assert_loads(tmp_path / "a.pth", model, key="state_dict")


def test_an_average_without_decoder_takes_no_other_models(model, tmp_path):
    average = trained(seed=7).state_dict()
    torch.save({"state_dict": below("model.", model.state_dict()) | below("ema.", encoder_of(average))}, tmp_path / "a.pth")
    assert not assert_loads(tmp_path / "a.pth", trained(seed=1).state_dict() | encoder_of(average), key="ema").has_decoder
