"""A small configuration and transformers' model of it; importers skip without transformers."""

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 192}
SMALL |= {"image_size": 32, "patch_size": 8, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1}
SMALL |= {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 128}


def configuration(**options: object):
    return transformers.ViTMAEConfig(**{**SMALL, **options})


def theirs(config, seed: int = 0) -> nn.Module:
    """Return a model with random parameters, as a fresh one has positions of zero."""
    torch.manual_seed(seed)
    model = transformers.ViTMAEForPreTraining(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05 + (parameter if parameter.dim() == 1 else 0))
    return model
