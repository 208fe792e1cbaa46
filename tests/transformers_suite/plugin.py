"""A pytest plugin under which transformers' own tests of ViTMAE test maefast's classes."""

from transformers.models.vit_mae import modeling_vit_mae

from maefast import hf

modeling_vit_mae.ViTMAEModel, modeling_vit_mae.ViTMAEForPreTraining = hf.ViTMAEModel, hf.ViTMAEForPreTraining
