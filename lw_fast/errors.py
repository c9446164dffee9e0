"""The one exception for mistakes a user can mend."""


class UserError(ValueError):
    """A mistake in a flag, a file or a folder, told in one line that says how to mend it.

    Command lines print the message without a traceback and exit with status 2.
    """
