"""Commands that train and evaluate. They raise UserError for errors that the user can correct."""

from .errors import UserError

__all__ = ["UserError"]
