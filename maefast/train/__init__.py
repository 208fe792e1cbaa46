"""Training around the model: data, schedules, optimizers, the demo. Nothing here is needed to use `maefast.MAE` in a script of one's own."""


class UserError(Exception):
    """Something that the user can put right; the command line prints it as one line and exits with code 2."""
