"""The one exception that users see as a message instead of a traceback."""


class UserError(Exception):
    """A refusal: it states the value it got, why that cannot be, and what to change."""
