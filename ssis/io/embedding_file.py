r"""SAM's embedding of one image on disk: a checksum, then the numbers.

Read next: `ssis/sam.py`, which asks for them.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssis.io.files import whole


def read_entry(path: Path, cells: int) -> Tensor | None:
    """An embedding from disk; None where there is none, or a damaged one."""
    if not path.exists():
        return None
    try:
        content = path.read_bytes()
    except OSError:
        content = b""
    checksum, values = content[:16], content[16:]
    if hashlib.blake2b(values, digest_size=16).digest() != checksum:
        print(f"{path}: damaged, made again", file=sys.stderr)
        return None
    numbers = np.frombuffer(bytearray(values), np.float16)
    return torch.from_numpy(numbers).reshape(-1, cells, cells)


def write_entry(path: Path, embedding: Tensor, room: float) -> int:
    """Write an entry, whole or not at all, if there is room; returns its bytes."""
    values = embedding.numpy().tobytes()
    if len(values) + 16 > room:
        return 0
    checksum = hashlib.blake2b(values, digest_size=16).digest()
    try:
        with whole(path) as temporary:
            temporary.write_bytes(checksum + values)
    except OSError as error:
        # A cache that cannot be written costs time, not the run.
        print(f"{path}: not kept ({error.strerror})", file=sys.stderr)
        return 0
    return len(values) + 16
