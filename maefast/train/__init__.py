"""Training with the model: data, pretrain, evaluate, ablation, demo. Your own script needs none of
it.

All of them raise UserError for errors that the user can correct.
"""

from .errors import UserError

__all__ = ["UserError"]
