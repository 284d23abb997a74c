"""The error that the command line prints without a traceback."""


class UsageError(Exception):
    """Wrong input from the user; the message says what to do about it."""
