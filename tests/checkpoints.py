"""What the tests of checkpoints share: small models with random weights, comparisons, folders as other libraries write them."""

import json
from pathlib import Path

import torch
from support import SMALL
from torch import Tensor, nn

from maefast import MAE

SQUARE = {name: value for name, value in SMALL.items() if name != "norm_pix_loss"} | {"img_size": 32, "patch_size": 8}
HEADS = {"num_heads": 4, "decoder_num_heads": 3}


def trained(seed: int = 0, **options: object) -> MAE:
    """A model whose every tensor is random, positions aside: one tensor in another's place would be seen."""
    torch.manual_seed(seed)
    model = MAE(**{**SQUARE, **options})
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "pos_embed" not in name:
                tensor.normal_(mean=float("norm" in name), std=0.2)
    return model


def assert_same_weights(a: dict[str, Tensor] | nn.Module, b: dict[str, Tensor] | nn.Module) -> None:
    a, b = (x.state_dict() if isinstance(x, nn.Module) else x for x in (a, b))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor, b[name]), name


def encoder_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if name != "mask_token" and not name.startswith("decoder_")}


def write_hugging_face(folder: Path, tensors: dict[str, Tensor], config: dict[str, object]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    import safetensors.torch

    safetensors.torch.save_file({name: t.detach().clone() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder
