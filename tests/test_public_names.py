"""The public names, written out; flags of the commands are in commands.json."""

import importlib
import json
from pathlib import Path

import pytest

from maefast import cli

SIZES = ("tiny_patch16", "small_patch16", "base_patch16", "large_patch16", "huge_patch14")
FACTORIES = {f"mae_vit_{size}{decoder}" for size in SIZES for decoder in ("", "_dec512d8b")}
WITH_REFERENCE = {"add_layer_norm", "attention", "bias_gelu", "gather_patches", "layer_norm", "linear", "mask_patches"}
WITH_REFERENCE |= {"masked_mse", "random_masking", "transformer_block", "unshuffle"}
NAMES = {
    "maefast": {"MAE", "SimpleFeaturePyramid", "VisionTransformer", "__version__", "backend", "explain", "ops"} | FACTORIES,
    "maefast.ops": WITH_REFERENCE | {f"{op}_ref" for op in WITH_REFERENCE} | {"BlockWeights", "len_keep", "masking_noise"},
    "maefast.hf": {"ViTMAEForPreTraining", "ViTMAEModel"},
    "maefast.models_mae": {"MaskedAutoencoderViT"} | FACTORIES,
    "maefast.models_vit": {"VisionTransformer"} | {f"vit_{size}" for size in SIZES},
}
COMMANDS = {"ablate", "convert", "demo", "extract", "finetune", "knn", "linprobe", "pack", "partial", "pretrain"}
COMMANDS |= {"reconstruct", "robustness", "submit"}


@pytest.mark.parametrize("module", NAMES)
def test_names(module):
    imported = importlib.import_module(module)
    assert set(imported.__all__) == NAMES[module]
    assert len(imported.__all__) == len(NAMES[module])
    assert all(hasattr(imported, name) for name in imported.__all__)


def test_commands():
    listed = json.loads(Path(__file__).with_name("commands.json").read_text())
    assert set(cli.COMMANDS) == set(listed) == COMMANDS
    assert all(listed.values()), "a command without a list of its flags"
