"""transformers' ViTMAEForPreTraining and ViTMAEModel on maefast's kernels.

Importing this does not import transformers; making a model does.
"""

from .models import ViTMAEForPreTraining, ViTMAEModel

__all__ = ["ViTMAEForPreTraining", "ViTMAEModel"]
