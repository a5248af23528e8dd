"""`train.py` on a disk that takes longer for a checkpoint than the other processes wait."""

import sys
import time
from datetime import timedelta

import train
from ssis import distributed
from ssis.io import checkpoint

distributed.PATIENCE = timedelta(seconds=15)
save = checkpoint.save


def slowly(path, state) -> None:
    """As `checkpoint.save`, where there is one already after a pause."""
    if path.name == "checkpoint.pt" and path.exists():
        time.sleep(25)
    save(path, state)


checkpoint.save = slowly
train.main(sys.argv[1:])
