"""Training around the model, in wings: data, pretrain, evaluate, ablation, demo. A script of one's own needs none of it.

UserError is what all of them raise for what the user can put right; scripts catch it under this name.
"""

from .errors import UserError

__all__ = ["UserError"]
