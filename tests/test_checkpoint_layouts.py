"""Other people's checkpoints: every layout and nesting found by its tensors, what is refused, and which of several is taken."""

import re
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import HEADS, assert_same_weights, encoder_of, trained
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from maefast import MAE, VisionTransformer, checkpoint
from maefast.checkpoint import CheckpointError

Tensors = dict[str, Tensor]
ENCODER = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}


@pytest.fixture(scope="module")
def model() -> MAE:
    return trained()


def renamed(tensors: Tensors, *changes: tuple[str, str]) -> Tensors:
    """Each change a pattern and its replacement, of which the first that matches a whole name counts."""

    def new(name: str) -> str:
        for pattern, replacement in changes:
            if re.fullmatch(pattern, name):
                return re.sub(pattern, replacement, name)
        raise AssertionError(name)

    return {new(name): tensor for name, tensor in tensors.items()}


def below(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def decoder_of(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name == "mask_token" or name.startswith("decoder_")}


def encoder(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name not in decoder_of(tensors)}


# The names that mmpretrain 1.x and mmselfsup 1.x give (backbone MAEViT, neck MAEPretrainDecoder).
MM_BLOCK = (
    (r"(.*)\.norm1\.(\w+)", r"\1.ln1.\2"),
    (r"(.*)\.norm2\.(\w+)", r"\1.ln2.\2"),
    (r"(.*)\.mlp\.fc1\.(\w+)", r"\1.ffn.layers.0.0.\2"),
    (r"(.*)\.mlp\.fc2\.(\w+)", r"\1.ffn.layers.1.\2"),
    (r"(.*)\.attn\.(qkv|proj)\.(\w+)", r"\1.attn.\2.\3"),
)


def mmpretrain(tensors: Tensors) -> Tensors:
    blocks = {name.replace("blocks.", "layers.", 1): t for name, t in encoder(tensors).items()}
    outside = (
        (r"patch_embed\.proj\.(\w+)", r"patch_embed.projection.\1"),
        (r"norm\.(\w+)", r"ln1.\1"),
        (r"(cls_token|pos_embed)", r"\1"),
    )
    backbone = renamed(blocks, *outside, *MM_BLOCK)
    neck = renamed(decoder_of(tensors), (r"decoder_norm\.(\w+)", r"ln1.\1"), *MM_BLOCK, (r"(.*)", r"\1"))
    return below("backbone.", backbone) | below("neck.", neck)


def torchvision_block(blocks: str, theirs: str) -> tuple[tuple[str, str], ...]:
    block = rf"{blocks}\.(\d+)\."
    theirs = rf"{theirs}encoder_layer_\1."
    return (
        (block + r"norm1\.(\w+)", theirs + r"ln_1.\2"),
        (block + r"norm2\.(\w+)", theirs + r"ln_2.\2"),
        (block + r"attn\.qkv\.(\w+)", theirs + r"self_attention.in_proj_\2"),
        (block + r"attn\.proj\.(\w+)", theirs + r"self_attention.out_proj.\2"),
        (block + r"mlp\.fc1\.(\w+)", theirs + r"mlp.0.\2"),
        (block + r"mlp\.fc2\.(\w+)", theirs + r"mlp.3.\2"),
    )


def torchvision(tensors: Tensors) -> Tensors:
    """lightly's MAEBackbone and MAEDecoder on torchvision's ViT; the mask token is the training module's."""
    outside = (
        (r"cls_token", "class_token"),
        (r"pos_embed", "encoder.pos_embedding"),
        (r"patch_embed\.proj\.(\w+)", r"conv_proj.\1"),
        (r"norm\.(\w+)", r"encoder.ln.\1"),
    )
    backbone = renamed(encoder(tensors), *torchvision_block("blocks", "encoder.layers."), *outside)
    outside = (
        (r"decoder_pos_embed", "pos_embedding"),
        (r"decoder_embed\.(\w+)", r"decoder_embed.\1"),
        (r"decoder_norm\.(\w+)", r"ln.\1"),
        (r"decoder_pred\.(\w+)", r"prediction_head.\1"),
    )
    decoder = {name: tensor for name, tensor in decoder_of(tensors).items() if name != "mask_token"}
    decoder = renamed(decoder, *torchvision_block("decoder_blocks", "layers."), *outside)
    return below("backbone.", backbone) | below("decoder.", decoder) | {"mask_token": tensors["mask_token"]}


def lightly(tensors: Tensors) -> Tensors:
    """MaskedVisionTransformerTIMM, which has a mask token that MAE does not use, and MAEDecoderTIMM."""
    unused = {"backbone.mask_token": torch.ones(1, 1, 32)}
    return below("backbone.vit.", encoder(tensors)) | unused | below("decoder.", decoder_of(tensors))


def fsdp(tensors: Tensors) -> Tensors:
    wrapped = {re.sub(r"blocks\.(\d+)\.", r"blocks.\1._fsdp_wrapped_module.", name): t for name, t in tensors.items()}
    return below("_fsdp_wrapped_module.", wrapped)


# Name: what is saved, what the report calls its layout, where the weights were, what else it names.
LAYOUTS: dict[str, tuple[Callable[[Tensors], object], str, str, tuple[str, ...]]] = {
    "bare": (lambda t: t, "official", "the top of the file", ()),
    "bare beside a number": (lambda t: {**t, "epoch": 3}, "official", "the top of the file", ("epoch",)),
    "model": (lambda t: {"model": t, "epoch": 3}, "official", "model", ("epoch",)),
    "another entry": (lambda t: {"net_weights": t}, "official", "net_weights", ()),
    "model_state_dict": (lambda t: {"model_state_dict": t}, "official", "model_state_dict", ()),
    "model_ema": (lambda t: {"model_ema": t}, "official", "model_ema", ()),
    "ema_state_dict": (lambda t: {"ema_state_dict": below("module.", t)}, "official", "ema_state_dict", ()),
    "deepspeed": (lambda t: {"module": below("module.", t), "global_steps": 3}, "official", "module", ("global_steps",)),
    "composer": (
        lambda t: {"state": {"model": below("model.", t)}, "rng": []},
        "official",
        "state.model, names after model.",
        ("rng",),
    ),
    "lightning": (
        lambda t: {"state_dict": below("model.", t), "epoch": 1, "hyper_parameters": {}},
        "official",
        "state_dict, names after model.",
        ("epoch", "hyper_parameters"),
    ),
    "lightning, with a metric": (
        lambda t: {"state_dict": below("net.mae.", t) | {"metric.total": torch.ones(3)}},
        "official",
        "state_dict, names after net.mae.",
        ("metric.total",),
    ),
    "lightning, compiled, DDP": (
        lambda t: {"state_dict": below("model._orig_mod.module.", t)},
        "official",
        "state_dict, names after model.",
        (),
    ),
    "lightly": (
        lambda t: {"state_dict": lightly(t)},
        "official",
        "state_dict, names after backbone.vit. and decoder.",
        ("backbone.mask_token",),
    ),
    "lightly's torchvision": (
        lambda t: {"state_dict": torchvision(t)},
        "torchvision",
        "state_dict, names after backbone. and decoder.",
        (),
    ),
    "encoder and decoder": (
        lambda t: below("encoder.", encoder(t)) | below("decoder.", decoder_of(t)),
        "official",
        "the top of the file, names after encoder. and decoder.",
        (),
    ),
    "solo-learn": (
        lambda t: {
            "state_dict": below("backbone.", encoder(t))
            | below("decoder.", decoder_of(t))
            | {"classifier.weight": torch.ones(3, 32)}
        },
        "official",
        "state_dict, names after backbone. and decoder.",
        ("classifier.weight",),
    ),
    "decoder outside": (
        lambda t: below("encoder.", encoder(t)) | decoder_of(t),
        "official",
        "the top of the file, names after encoder.",
        (),
    ),
    "mmpretrain": (
        lambda t: {"meta": {"epoch": 3}, "state_dict": mmpretrain(t) | {"data_preprocessor.mean": torch.ones(3)}},
        "mmpretrain",
        "state_dict, names after backbone. and neck.",
        ("meta", "data_preprocessor.mean"),
    ),
    "mmpretrain, DDP": (
        lambda t: {"state_dict": below("module.", mmpretrain(t))},
        "mmpretrain",
        "state_dict, names after backbone. and neck.",
        (),
    ),
    "blocks compiled": (
        lambda t: {re.sub(r"(blocks\.\d+)\.", r"\1._orig_mod.", name): tensor for name, tensor in t.items()},
        "official",
        "the top of the file",
        (),
    ),
    "fsdp": (fsdp, "official", "the top of the file", ()),
    "checkpoint wrappers": (
        lambda t: {name.replace(".attn.", "._checkpoint_wrapped_module.attn."): tensor for name, tensor in t.items()},
        "official",
        "the top of the file",
        (),
    ),
    "counters": (
        lambda t: {**below("module.", t), "n_averaged": torch.tensor(3), "initted": torch.tensor(True)},
        "official",
        "the top of the file",
        ("n_averaged", "initted"),
    ),
    "moments by name": (
        lambda t: {"model": t, "optimizer": {"exp_avg": {name: x + 1 for name, x in t.items()}}},
        "official",
        "model",
        ("optimizer",),
    ),
    "the same weights twice": (lambda t: {"model": t, "model_without_ddp": dict(t)}, "official", "model", ("model_without_ddp",)),
    "encoder of the same weights": (
        lambda t: {"encoder": encoder(t), "model": {name: tensor.clone() for name, tensor in t.items()}},
        "official",
        "model",
        ("encoder",),
    ),
    "shared tensors": (lambda t: {"model": below("model.", t) | below("alias.", t)}, "official", "model, names after model.", ()),
    "transposed in memory": (
        lambda t: {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in t.items()},
        "official",
        "the top of the file",
        (),
    ),
    "parameters": (lambda t: {name: nn.Parameter(x) for name, x in t.items()}, "official", "the top of the file", ()),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layout(model, tmp_path, case):
    make, layout, source, ignored = LAYOUTS[case]
    torch.save(make(model.state_dict()), tmp_path / "a.pth")
    target = trained(seed=1)
    report = checkpoint.load(target, tmp_path / "a.pth")
    assert_same_weights(target, model)
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
    make = LAYOUTS[case][0]
    torch.save({"state_dict": make(model.state_dict())["state_dict"]}, tmp_path / "whole.pth")
    tensors = torch.load(tmp_path / "whole.pth")["state_dict"]
    without = {name: t for name, t in tensors.items() if not re.search("decoder|neck|mask_token", name)}
    torch.save({"state_dict": without}, tmp_path / "a.pth")
    target = trained(seed=1)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    report = checkpoint.load(target, tmp_path / "a.pth")
    assert_same_weights(target, before | encoder_of(model))
    assert set(report.missing) == decoder_of(before).keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(model, tmp_path, dtype):
    torch.save({"state_dict": below("model.", {n: t.to(dtype) for n, t in model.state_dict().items()})}, tmp_path / "a.pth")
    target = trained(seed=1)
    checkpoint.load(target, tmp_path / "a.pth")
    assert_same_weights(target, {name: t.to(dtype).float() for name, t in model.state_dict().items()})


def test_safetensors_with_metadata_and_a_prefix(model, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    tensors = {name: t.contiguous() for name, t in below("model.", model.state_dict()).items()}
    safetensors.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt", "note": "timm"})
    target = trained(seed=1)
    report = checkpoint.load(target, tmp_path)
    assert_same_weights(target, model)
    assert report.source == "the top of the file, names after model."


def test_folders_of_deepspeed(model, tmp_path):
    """The folder that its engine saves to, and one of its steps; the optimizer's shards are left alone."""
    step = tmp_path / "global_step3"
    step.mkdir()
    (tmp_path / "latest").write_text("global_step3")
    torch.save({"module": model.state_dict(), "ds_config": {}}, step / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {}}, step / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    for folder in (tmp_path, step):
        target = trained(seed=1)
        assert checkpoint.load(target, folder).source == "module"
        assert_same_weights(target, model)


def test_checkpoint_file_of_lightning_in_a_folder(model, tmp_path):
    torch.save({"state_dict": below("model.", model.state_dict())}, tmp_path / "epoch=3.ckpt")
    target = trained(seed=1)
    checkpoint.load(target, tmp_path)
    assert_same_weights(target, model)


# -- several models in one file ---------------------------------------------------------------------------


def with_average(model: MAE) -> tuple[Tensors, Tensors]:
    return model.state_dict(), trained(seed=7).state_dict()


SEVERAL = {
    "entries": (lambda a, b: {"model": a, "model_ema": b}, ("model", "model_ema")),
    "prefixes": (lambda a, b: {"state_dict": below("model.", a) | below("ema.", b)}, ("state_dict.model", "state_dict.ema")),
    "prefixes, the last part": (lambda a, b: {"state_dict": below("model.", a) | below("ema.", b)}, ("model", "ema")),
    "students": (lambda a, b: {"student": below("backbone.", a), "teacher": below("backbone.", b)}, ("student", "teacher")),
    "entry and top": (lambda a, b: {**a, "ema": b}, (".", "ema")),
    "prefix and none": (lambda a, b: a | below("ema_model.", b), (".", "ema_model")),
    "averaging of lucidrains": (
        lambda a, b: (
            below("online_model.", a) | below("ema_model.", b) | {"initted": torch.tensor(True), "step": torch.tensor(3)}
        ),
        ("online_model", "ema_model"),
    ),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_several_models_need_a_key(model, tmp_path, case):
    make, keys = SEVERAL[case]
    both = with_average(model)
    torch.save(make(*both), tmp_path / "a.pth")
    target = trained(seed=1)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    values = sum(tensor.numel() for tensor in before.values())
    message = rf"holds several models; key must name one of .*\({len(before)} tensors, {values:,} values, encoder and decoder\)"
    for call in (
        lambda: checkpoint.load(target, tmp_path / "a.pth"),
        lambda: target.init_from(tmp_path / "a.pth"),
        lambda: MAE.from_pretrained(tmp_path / "a.pth", **HEADS),
        lambda: checkpoint.convert(tmp_path / "a.pth", tmp_path / "b.pth", "official"),
    ):
        with pytest.raises(CheckpointError, match=message):
            call()
    assert_same_weights(target, before)
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
    target = trained(seed=1)
    checkpoint.load(target, tmp_path / "a.pth", key="state_dict")
    assert_same_weights(target, model)


def test_an_average_without_decoder_takes_no_other_models(model, tmp_path):
    average = trained(seed=7).state_dict()
    torch.save({"state_dict": below("model.", model.state_dict()) | below("ema.", encoder(average))}, tmp_path / "a.pth")
    target = trained(seed=1)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    assert not checkpoint.load(target, tmp_path / "a.pth", key="ema").has_decoder
    assert_same_weights(target, before | encoder(average))


# -- counters and heads -----------------------------------------------------------------------------------


def probe(classes: int = 5) -> VisionTransformer:
    """The official linear probe."""
    torch.manual_seed(3)
    model = VisionTransformer(**ENCODER, num_classes=classes)
    model.head = nn.Sequential(nn.BatchNorm1d(32, affine=False, eps=1e-6), model.head)
    model.head[0].num_batches_tracked.fill_(7)
    return model


def test_counters_of_a_head_are_loaded(tmp_path):
    source, target = probe(), probe()
    torch.save({"model": source.state_dict()}, tmp_path / "probe.pth")
    target.head[0].num_batches_tracked.fill_(0)
    report = checkpoint.load(target, tmp_path / "probe.pth")
    assert target.head[0].num_batches_tracked.item() == 7
    assert (report.missing, report.unexpected, report.ignored) == ((), (), ())


def test_counters_of_a_head_stay_with_it(tmp_path):
    torch.save({"model": probe().state_dict()}, tmp_path / "probe.pth")
    encoder = VisionTransformer(**ENCODER, num_classes=0)
    report = checkpoint.load(encoder, tmp_path / "probe.pth")
    assert set(report.unexpected) == {name for name in probe().state_dict() if name.startswith("head.")}
    assert_same_weights(encoder, {name: t for name, t in probe().state_dict().items() if not name.startswith("head.")})


def test_averaged_model(model, tmp_path):
    torch.save(AveragedModel(model).state_dict(), tmp_path / "average.pth")
    target = trained(seed=1)
    assert checkpoint.load(target, tmp_path / "average.pth").ignored == ("n_averaged",)
    assert_same_weights(target, model)


@pytest.mark.parametrize("source", [VisionTransformer(**ENCODER, num_classes=5), probe(7)], ids=["classes", "probe"])
def test_a_head_of_other_classes_is_left_out(tmp_path, source):
    """As official fine-tuning does; the model's own stays as it was."""
    torch.save({"model": source.state_dict()}, tmp_path / "classifier.pth")
    target = VisionTransformer(**ENCODER, num_classes=7)
    head = {name: tensor.clone() for name, tensor in target.head.state_dict().items()}
    report = checkpoint.load(target, tmp_path / "classifier.pth")
    assert_same_weights(target.head, head)
    assert torch.equal(target.norm.weight, source.norm.weight)
    found = r"head.weight \(5, 32\)" if isinstance(source.head, nn.Linear) else r"head.1.weight \(7, 32\)"
    (warning,) = report.warnings
    assert re.fullmatch(
        rf"the head of the checkpoint, {found}, is left out: VisionTransformer has head.weight \(7, 32\)", warning
    )
    assert set(report.missing) == {"head.weight", "head.bias"}


def test_a_classifier_for_an_mae(tmp_path):
    """Its encoder; the head is left out, and the decoder stays as it was."""
    classifier = VisionTransformer(**ENCODER, num_classes=5)
    torch.save(classifier.state_dict(), tmp_path / "vit.pth")
    target = trained(seed=1)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    report = checkpoint.load(target, tmp_path / "vit.pth")
    tensors = {name: tensor for name, tensor in classifier.state_dict().items() if not name.startswith("head.")}
    assert_same_weights(target, before | tensors)
    warning = "the head of the checkpoint, head.weight (5, 32), is left out"
    assert report.warnings == (f"{warning}: MAE has none", "the checkpoint holds no decoder; the model keeps its own")
    with pytest.warns(UserWarning, match="is left out: MAE has none"):
        loaded = MAE.from_pretrained(tmp_path / "vit.pth", num_heads=4)
    assert_same_weights(encoder_of(loaded), tensors)
    report = checkpoint.convert(tmp_path / "vit.pth", tmp_path / "out.pth", "timm")
    assert_same_weights(torch.load(tmp_path / "out.pth"), tensors)
    assert report.unexpected == ("head.weight", "head.bias")
    assert report.warnings == (f"{warning}: what is written has none",)


def test_heads_of_other_libraries(tmp_path):
    """transformers' classifier and pooler, mmpretrain's head: beside the encoder."""
    tensors = encoder_of(trained())
    torch.save({"state_dict": mmpretrain(tensors) | {"head.layers.head.weight": torch.ones(5, 32)}}, tmp_path / "mm.pth")
    target = VisionTransformer(**ENCODER, num_classes=0)
    assert checkpoint.load(target, tmp_path / "mm.pth").ignored == ("head.layers.head.weight",)
    assert_same_weights(target, tensors)


# -- what is refused --------------------------------------------------------------------------------------


def quantised(tensors: Tensors) -> object:
    layers = nn.Sequential(nn.Linear(32, 32))
    torch.backends.quantized.engine = torch.backends.quantized.supported_engines[-1]
    quantized = torch.ao.quantization.quantize_dynamic(layers, {nn.Linear}, torch.qint8).state_dict()
    return {**tensors, **below("blocks.0.attn.", quantized)}


def changed(name: str, change: Callable[[Tensor], object]) -> Callable[[Tensors], object]:
    return lambda tensors: {**tensors, name: change(tensors[name])}


REFUSED: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "optimizer": (
        lambda t: {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1.0}]},
        "holds the state of an optimizer, and no weights$",
    ),
    "optimizer of DeepSpeed": (
        lambda t: {"optimizer_state_dict": {"single_partition": torch.ones(9)}, "ds_version": "1"},
        "holds the state of an optimizer, and no weights$",
    ),
    "ZeRO-3": (lambda t: {"module": {n: torch.empty(0) for n in t}}, "holds empty tensors, .*zero_to_fp32.py$"),
    "flat parameters": (
        lambda t: {"_fsdp_wrapped_module._flat_param": torch.ones(99)},
        "flattened parameters of FSDP; save a full",
    ),
    "an empty tensor": (changed("norm.bias", lambda x: x[:0]), "holds empty tensors, norm.bias"),
    "on the meta device": (lambda t: {n: x.to("meta") for n, x in t.items()}, "it has .*, without values on the device meta$"),
    "sparse": (changed("norm.bias", lambda x: x.to_sparse()), r"it has norm.bias, of layout torch.sparse_coo$"),
    "quantised tensor": (
        changed("norm.bias", lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)),
        r"must hold floating-point tensors; it has norm.bias of torch.qint8|a quantised tensor of torch.qint8$",
    ),
    "quantised layers": (quantised, "holds quantised weights; save the state_dict of the model before quantisation$"),
    "eight bits": (changed("norm.bias", lambda x: x.to(torch.float8_e4m3fn)), "it has norm.bias of torch.float8_e4m3fn$"),
    "bitsandbytes": (
        lambda t: {
            **t,
            "blocks.0.attn.qkv.weight": torch.ones(1536, 1, dtype=torch.uint8),
            "blocks.0.attn.qkv.absmax": torch.ones(3),
        },
        "it has blocks.0.attn.qkv.weight of torch.uint8$",
    ),
    "complex": (changed("norm.bias", lambda x: x.to(torch.complex64)), "it has norm.bias of torch.complex64$"),
    "larger than the file": (
        changed("norm.bias", lambda x: x[:1].expand(1 << 30)),
        "norm.bias of shape .* is larger than the file$",
    ),
    "BEiT": (
        lambda t: {**t, "blocks.0.attn.relative_position_bias_table": torch.ones(9, 4), "blocks.0.gamma_1": torch.ones(32)},
        "relative_position_bias_table, blocks.0.gamma_1, for which there is no place$",
    ),
    "layer scale of mmpretrain": (
        lambda t: {"state_dict": mmpretrain(t) | {"backbone.layers.0.ln3.weight": torch.ones(32)}},
        "it has layers.0.ln3.weight, for which there is no place$",
    ),
    "another decoder": (
        lambda t: below("backbone.", encoder(t)) | below("decoder.", decoder_of(t)) | {"decoder.extra.weight": torch.ones(3)},
        "it has extra.weight, for which there is no place$",
    ),
    "names with and without a wrapper": (
        lambda t: {**t, "module.norm.bias": torch.ones(32)},
        "holds norm.bias twice, with and without the prefix of a wrapper$",
    ),
    "positions of another grid in the decoder": (
        changed("decoder_pos_embed", lambda x: x[:, :5]),
        r"decoder_pos_embed of .* must be \(1, 17, (D\) for 16 patches|24\) beside its other tensors); its shape is \(1, 5",
    ),
    "positions of nothing": (changed("pos_embed", lambda x: x[:, :1]), "must have positions of patches"),
    "no class token": (lambda t: {n: x for n, x in t.items() if n != "cls_token"}, "it lacks cls_token$"),
    "decoder alone": (decoder_of, "holds no Masked Autoencoder: it has neither .* below any prefix, but mask_token"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(model, tmp_path, case):
    make, message = REFUSED[case]
    torch.save(make(model.state_dict()), tmp_path / "a.pth")
    target = trained(seed=1)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    for call in (
        lambda: checkpoint.load(target, tmp_path / "a.pth"),
        lambda: target.init_from(tmp_path / "a.pth"),
        lambda: MAE.from_pretrained(tmp_path / "a.pth", **HEADS),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert_same_weights(target, before)


def write_zip(path: Path, compression: int, name: str = "a/data.pkl") -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(name, bytes(1000))
    return path


def script(path: Path) -> Path:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    return path


def folder(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).write_bytes(b"")
    return path


def deepspeed(path: Path, tag: str) -> Path:
    (folder(path, "latest") / "latest").write_text(tag)
    return path


FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "TorchScript": (script, "is a TorchScript archive, which holds code; save only the state_dict"),
    "npz": (lambda p: write_zip(p, zipfile.ZIP_STORED, "a.npy"), "is a zip archive that torch.save did not write"),
    "compressed": (lambda p: write_zip(p, zipfile.ZIP_DEFLATED), "is a compressed zip archive; torch.save writes it without"),
    "sharded by torch": (
        lambda p: folder(p, ".metadata", "__0_0.distcp"),
        "holds shards of torch.distributed.checkpoint; join them",
    ),
    "sharded by ZeRO-3": (
        lambda p: folder(p, "zero_pp_rank_0_mp_rank_00_model_states.pt"),
        "DeepSpeed's ZeRO-3 shards the weights; join them with its zero_to_fp32.py",
    ),
    "step outside": (lambda p: deepspeed(p, "../.."), "latest must name a folder beside it; it holds '../..'"),
    "step that is absent": (lambda p: deepspeed(p, "global_step3"), "latest must name a folder beside it"),
    "deep config": (
        lambda p: (folder(p) / "config.json").write_text("[" * 100_000) and p,
        "config.json is not JSON: ",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_refused_file(tmp_path, case):
    make, message = FILES[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(trained(), make(tmp_path / "a.pth"))
    assert "\n" not in str(caught.value)


class Log:
    """An object of a training framework; making one again is seen."""

    made = 0

    def __init__(self, value: float = 0.0):
        self.value = value

    def __setstate__(self, state: dict[str, object]) -> None:
        Log.made += 1


def save_foreign(make: Callable[[type], object], name: str, base: type, path: Path, legacy: bool = False) -> None:
    """torch.save of what `make` makes of a class called `name`, of a module that need not be installed."""
    module, _, attribute = name.rpartition(".")
    kind = type(attribute, (base,), {"__module__": module})
    parents = [module.rsplit(".", i)[0] for i in range(module.count(".") + 1)]
    with pytest.MonkeyPatch.context() as patch:
        for parent in parents:
            if parent == module or parent not in sys.modules:
                patch.setitem(sys.modules, parent, types.ModuleType(parent))
        setattr(sys.modules[module], attribute, kind)
        torch.save(make(kind), path, _use_new_zipfile_serialization=not legacy)


def test_sharded_tensors_are_refused(tmp_path):
    name = "torch.distributed._shard.sharded_tensor.api.ShardedTensor"
    save_foreign(lambda kind: {"model": {"norm.weight": kind()}}, name, Log, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="holds sharded tensors; save a full state_dict"):
        checkpoint.load(trained(), tmp_path / "a.pth")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_tensors_of_a_mesh_are_refused(model, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        tensors = {name: distribute_tensor(t.detach(), mesh, [Shard(0)]) for name, t in model.state_dict().items()}
        torch.save({"model": tensors}, tmp_path / "a.pth")
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(CheckpointError, match="holds sharded tensors; save a full state_dict"):
        checkpoint.load(trained(), tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("base", "arguments", "name"),
    [
        (Log, {"value": 3.0}, "mmengine.logging.history_buffer.HistoryBuffer"),
        (Log, {"value": 3.0}, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
        (dict, {"lr": 1e-3}, "lightning_fabric.utilities.data.AttributeDict"),
        (dict, {"lr": 1e-3}, "mmengine.config.config.ConfigDict"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_objects_beside_the_weights_are_not_made(model, tmp_path, base, arguments, name, legacy):
    weights = below("model.", model.state_dict())
    save_foreign(
        lambda kind: {"state_dict": weights, "beside": {"log": [kind(**arguments)]}}, name, base, tmp_path / "a.pth", legacy
    )
    before, target = Log.made, trained(seed=1)
    assert checkpoint.load(target, tmp_path / "a.pth").ignored == ("beside",)
    assert Log.made == before
    assert_same_weights(target, model)


def test_an_object_in_the_place_of_a_tensor(model, tmp_path):
    save_foreign(lambda kind: {"model": {**model.state_dict(), "norm.bias": kind()}}, "timm.Buffer", Log, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"it lacks norm.bias$"):
        checkpoint.load(trained(), tmp_path / "a.pth")


def test_numbers_of_numpy_and_paths_beside_the_weights(model, tmp_path):
    np = pytest.importorskip("numpy", reason="numpy is not installed")
    beside = {"best": np.float64(0.5), "curve": np.arange(3), "folder": Path("out")}
    torch.save({"model": model.state_dict(), **beside}, tmp_path / "a.pth")
    target = trained(seed=1)
    assert checkpoint.load(target, tmp_path / "a.pth").ignored == tuple(beside)
    assert_same_weights(target, model)
