"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """A mistake that the user can mend: its message is one sentence that says what is wrong, where, and what to do.

    Scripts print the message without a traceback and exit with status 2.
    """
