"""What goes wrong with data, in words for the user."""


class DataError(ValueError):
    """The data cannot be used as asked: one sentence for the user, to be shown without a traceback."""
