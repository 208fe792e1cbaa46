"""Checkpoints to and from transformers: its models load them, and compute what maefast's do."""

import argparse

import pytest
import torch
from checkpoints import HEADS, encoder_of, trained, write_hugging_face
from hf_models import configuration, theirs, transformers
from support import images_for, noise_for
from torch import nn

from maefast import MAE, checkpoint

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

PUBLISHED = (  # transformers 5's names of modules -> those of its published files
    ("vit.layers.", "vit.encoder.layer."),
    ("attention.q_proj", "attention.attention.query"),
    ("attention.k_proj", "attention.attention.key"),
    ("attention.v_proj", "attention.attention.value"),
    ("attention.o_proj", "attention.output.dense"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
)


@pytest.fixture(scope="module")
def vit_mae() -> nn.Module:
    transformers.logging.disable_progress_bar()
    encoder = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 128}
    decoder = {"decoder_hidden_size": 24, "decoder_num_attention_heads": 3, "decoder_intermediate_size": 96}
    return theirs(configuration(**encoder, **decoder, norm_pix_loss=True, mask_ratio=0.5), seed=3).eval()


def assert_computes_the_same(model: MAE, other: nn.Module) -> None:
    """Loss, predictions and mask of maefast's and transformers' model, in float64."""
    imgs, noise = images_for(model).double(), noise_for(model)
    loss, pred, mask = model.double()(imgs, mask_ratio=other.config.mask_ratio, noise=noise)
    with torch.no_grad():
        out = other.double()(pixel_values=imgs, noise=noise)
    torch.testing.assert_close(loss.double(), out.loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(pred, out.logits, rtol=0, atol=1e-10)
    assert torch.equal(mask.double(), out.mask.double())
    other.float()


@pytest.mark.parametrize("names", ["published", "version 5", "saved by version 5"])
def test_transformers_names(vit_mae, tmp_path, names):
    tensors, config = vit_mae.state_dict(), vit_mae.config.to_dict()
    for new, old in PUBLISHED if names == "published" else ():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    assert ("decoder.decoder_layers.0.attention.attention.query.weight" in tensors) == (names == "published")
    if names == "saved by version 5":
        vit_mae.save_pretrained(tmp_path / "vit-mae")
    else:
        write_hugging_face(tmp_path / "vit-mae", tensors, config)
    loaded = MAE.from_pretrained(tmp_path / "vit-mae")
    assert loaded.norm.eps == vit_mae.config.layer_norm_eps == 1e-12
    assert loaded.norm_pix_loss is True
    assert_computes_the_same(loaded, vit_mae)


def test_transformers_encoder_alone(vit_mae, tmp_path):
    transformers.ViTMAEModel(vit_mae.config).save_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning, match="no decoder"):
        loaded = MAE.from_pretrained(tmp_path / "model")
    other = safetensors.load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(loaded.norm.weight, other["layernorm.weight"])
    assert torch.equal(loaded.blocks[1].attn.qkv.weight[:32], other["encoder.layer.1.attention.attention.query.weight"])


def test_convert_for_transformers(tmp_path):
    args = argparse.Namespace(norm_pix_loss=True, mask_ratio=0.6)
    torch.save({"model": trained().state_dict(), "args": args}, tmp_path / "official.pth")
    report = checkpoint.convert(tmp_path / "official.pth", tmp_path / "hf", "transformers", **HEADS)
    assert (report.missing, report.unexpected, report.warnings) == ((), (), ())
    other, info = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    assert other.config.norm_pix_loss is True
    assert (other.config.mask_ratio, other.config.layer_norm_eps) == (0.6, 1e-6)
    assert_computes_the_same(trained(norm_pix_loss=True), other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "official.pth"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_convert_keeps_the_dtype(tmp_path, dtype):
    model = trained().to(dtype)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    checkpoint.convert(tmp_path / "bare.pth", tmp_path / "hf", "transformers", norm_pix_loss=False, **HEADS)
    other = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "hf", dtype="auto")
    assert torch.equal(other.decoder.decoder_layers[0].attention.k_proj.weight, model.decoder_blocks[0].attn.qkv.weight[24:48])


def test_convert_an_encoder_for_transformers(tmp_path):
    model = trained()
    torch.save({"model": encoder_of(model)}, tmp_path / "encoder.pth")
    checkpoint.convert(tmp_path / "encoder.pth", tmp_path / "hf", "transformers", num_heads=4)
    other, info = transformers.ViTMAEModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(other.layers[1].attention.v_proj.bias, model.blocks[1].attn.qkv.bias[64:])
