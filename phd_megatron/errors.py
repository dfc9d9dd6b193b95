"""The one exception that users see as a message instead of a traceback."""

DIVERGED = "the run has diverged"
"""Start of the message when parameters are not finite any more; a sweep recognises such a member by it."""


class UserError(Exception):
    """A refusal: it states the value it got, why that cannot be, and what to change."""

    exit_code = 2


class RunLost(UserError):
    """A run that ended for no fault of its input: starting it again helps."""

    exit_code = 1
