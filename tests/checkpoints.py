"""Small models with random weights, comparisons, and folders as other libraries write them."""

import json
import re
from pathlib import Path

import pytest
import torch
from support import SMALL
from torch import Tensor, nn

from maefast import MAE, checkpoint
from maefast.reference import sincos_positions

Tensors = dict[str, Tensor]
Weights = Tensors | nn.Module

SQUARE = {name: value for name, value in SMALL.items() if name != "norm_pix_loss"} | {"img_size": 32, "patch_size": 8}
HEADS = {"num_heads": 4, "decoder_num_heads": 3}


def trained(seed: int = 0, **options: object) -> MAE:
    """A model with random tensors, positions aside, so that a misplaced one is seen."""
    torch.manual_seed(seed)
    model = MAE(**{**SQUARE, **options})
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "pos_embed" not in name:
                tensor.normal_(mean=float("norm" in name), std=0.2)
    return model


def tensors_of(weights: Weights) -> Tensors:
    return weights.state_dict() if isinstance(weights, nn.Module) else weights


def assert_same_weights(a: Weights, b: Weights) -> None:
    a, b = tensors_of(a), tensors_of(b)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor, b[name]), name


def copy_of(weights: Weights) -> Tensors:
    return {name: tensor.clone() for name, tensor in tensors_of(weights).items()}


def assert_loads(path: Path, expected: Weights, **options: object) -> checkpoint.LoadReport:
    """Load a file into a model of other weights, which must then be `expected`."""
    target = trained(seed=1)
    report = checkpoint.load(target, path, **options)
    assert_same_weights(target, expected)
    return report


def assert_positions_of_8_x_5(model: MAE, report: checkpoint.LoadReport) -> None:
    """Sin-cos positions are computed anew for another grid than the file's, 4 x 4."""
    assert torch.equal(model.pos_embed, sincos_positions(32, (8, 5)))
    assert torch.equal(model.decoder_pos_embed, sincos_positions(24, (8, 5)))
    change = "computed as sin-cos for 8 x 5 patches; the file has 4 x 4"
    assert report.positions == (f"decoder_pos_embed {change}", f"pos_embed {change}")


def assert_refused(path: Path, message: str) -> None:
    """Each way to read a file raises one line that matches, and nothing changes."""
    target, there = trained(seed=1), sorted(path.parent.iterdir())
    before = copy_of(target)
    for call in (
        lambda: checkpoint.load(target, path),
        lambda: target.init_from(path),
        lambda: MAE.from_pretrained(path, **HEADS),
        lambda: checkpoint.convert(path, path.with_name("converted.pth"), "official"),
    ):
        with pytest.raises(checkpoint.CheckpointError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert_same_weights(target, before)
    assert sorted(path.parent.iterdir()) == there


def decoder_of(weights: Weights) -> Tensors:
    return {name: t for name, t in tensors_of(weights).items() if name == "mask_token" or name.startswith("decoder_")}


def encoder_of(weights: Weights) -> Tensors:
    return {name: t for name, t in tensors_of(weights).items() if name not in decoder_of(weights)}


def write_hugging_face(folder: Path, tensors: Tensors, config: dict[str, object]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    import safetensors.torch

    safetensors.torch.save_file({name: t.detach().clone() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder


def renamed(tensors: Tensors, *changes: tuple[str, str]) -> Tensors:
    """Rename by pairs (pattern, replacement); the first that matches a whole name counts."""

    def new(name: str) -> str:
        for pattern, replacement in changes:
            if re.fullmatch(pattern, name):
                return re.sub(pattern, replacement, name)
        raise AssertionError(name)

    return {new(name): tensor for name, tensor in tensors.items()}


def below(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


# The names that mmpretrain 1.x and mmselfsup 1.x give (backbone MAEViT, neck MAEPretrainDecoder).
MM_BLOCK = (
    (r"(.*)\.norm1\.(\w+)", r"\1.ln1.\2"),
    (r"(.*)\.norm2\.(\w+)", r"\1.ln2.\2"),
    (r"(.*)\.mlp\.fc1\.(\w+)", r"\1.ffn.layers.0.0.\2"),
    (r"(.*)\.mlp\.fc2\.(\w+)", r"\1.ffn.layers.1.\2"),
    (r"(.*)\.attn\.(qkv|proj)\.(\w+)", r"\1.attn.\2.\3"),
)


def mmpretrain(tensors: Tensors) -> Tensors:
    blocks = {name.replace("blocks.", "layers.", 1): t for name, t in encoder_of(tensors).items()}
    outside = ((r"patch_embed\.proj\.(\w+)", r"patch_embed.projection.\1"), (r"norm\.(\w+)", r"ln1.\1"))
    backbone = renamed(blocks, *outside, (r"(cls_token|pos_embed)", r"\1"), *MM_BLOCK)
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
    """lightly's MAEBackbone and MAEDecoder on torchvision's ViT."""
    outside = (
        (r"cls_token", "class_token"),
        (r"pos_embed", "encoder.pos_embedding"),
        (r"patch_embed\.proj\.(\w+)", r"conv_proj.\1"),
        (r"norm\.(\w+)", r"encoder.ln.\1"),
    )
    backbone = renamed(encoder_of(tensors), *torchvision_block("blocks", "encoder.layers."), *outside)
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
    """lightly's MaskedVisionTransformerTIMM, with an unused mask token, and MAEDecoderTIMM."""
    unused = {"backbone.mask_token": torch.ones(1, 1, 32)}
    return below("backbone.vit.", encoder_of(tensors)) | unused | below("decoder.", decoder_of(tensors))


def fsdp(tensors: Tensors) -> Tensors:
    wrapped = {re.sub(r"blocks\.(\d+)\.", r"blocks.\1._fsdp_wrapped_module.", name): t for name, t in tensors.items()}
    return below("_fsdp_wrapped_module.", wrapped)
