r"""Ctrl-C and SIGTERM ask for an end instead of making one.

A cluster sends SIGTERM some seconds before it kills. The step under way ends, its
checkpoint is written, and the same command goes on later.

Read next: `ssis/engine/session.py`, which asks after every step.
"""

import signal

import torch

from ssis.distributed import all_sum


class StopSignals:
    """In this context Ctrl-C and SIGTERM ask for an end instead of making one.

    Args:
        device: of this process.
    """

    def __init__(self, device: torch.device):
        self.device, self.received = device, False

    def __enter__(self) -> "StopSignals":
        def receive(number, frame):
            self.received = True

        names = (signal.SIGINT, signal.SIGTERM)
        self.before = {name: signal.signal(name, receive) for name in names}
        return self

    def __exit__(self, *error) -> None:
        for name, handler in self.before.items():
            signal.signal(name, handler)

    def asked(self) -> bool:
        """Whether any process was asked; all of them must call this, and all agree."""
        mine = torch.tensor(float(self.received), device=self.device)
        return all_sum(mine).item() > 0
