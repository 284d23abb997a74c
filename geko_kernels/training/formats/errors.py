"""The error for data that cannot be trained on."""


class DataError(ValueError):
    """The message says what is wrong with the data, where, and what to do. The command line prints only the message."""
