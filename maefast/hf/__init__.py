"""transformers' ViTMAEForPreTraining and ViTMAEModel on maefast's kernels: the same configuration, forward, outputs, checkpoints.

Importing this does not import transformers; making a model does.
"""

from .models import ViTMAEForPreTraining, ViTMAEModel

__all__ = ["ViTMAEForPreTraining", "ViTMAEModel"]
