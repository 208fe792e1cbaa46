"""Training around the model: data, schedules, optimizers, the demo. A script of one's own needs none of it."""


class UserError(Exception):
    """Something that the user can put right; the command line prints it as one line and exits with code 2."""
