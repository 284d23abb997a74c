"""The error for data that cannot be trained on."""


class DataError(ValueError):
    """What is wrong with the data, where, and what to do about it. The command line prints it without a traceback."""
