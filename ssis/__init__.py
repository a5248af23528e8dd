"""ssis: semi-supervised instance segmentation, one concept per file (see README.md)."""

import os

# PyTorch's threads wait for each other after every operation. By default they spin,
# and where another program uses the cores too, a step takes many times as long
# (docs/performance.md). Read when torch is loaded; what the user has set stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class UserError(Exception):
    """Something the user gave is wrong; the message says what, where, how to mend it.

    The programs catch it, print its one line and exit with status 2, with no
    traceback: a traceback is for the mistakes of this code, not of its user.
    """
