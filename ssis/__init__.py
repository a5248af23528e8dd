"""ssis: semi-supervised instance segmentation, one concept per file (see README.md)."""


class UserError(Exception):
    """Something the user gave is wrong; the message says what, where, how to mend it.

    The programs catch it, print its one line and exit with status 2, with no
    traceback: a traceback is for the mistakes of this code, not of its user.
    """
