"""The one error that a user's input can raise."""


class UserError(Exception):
    """Input that cannot be used; its message is one sentence: what was given, what was expected, what to do.

    Commands print the message alone and exit with status 2.
    """
