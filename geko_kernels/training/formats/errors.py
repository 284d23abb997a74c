"""The error for data that cannot be trained on."""


class DataError(ValueError):
    """Says what is wrong with the data, where, and what to do. The command line prints it without a traceback."""
