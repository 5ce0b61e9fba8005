"""The one exception that means: the user's input is wrong, or what is on disk is."""


class UserError(Exception):
    """One clear line that names the thing, its value and what is allowed.

    Commands print it without a stack trace and exit with status 2.
    """
