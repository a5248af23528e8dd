r"""SAM's embeddings, each computed once: kept in memory, and in files.

The cache on disk (`--sam-cache`) serves all processes and all runs; in memory each
process keeps those of the images that came to it. An embedding is rounded to 16 bits,
even if it is kept nowhere and computed again each time, so on the same kind of device
the cache does not change what is trained. A file is a checksum, then the numbers.

Read next: `ssis/sam.py`, which encodes an image.
"""

import hashlib
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssis import UserError
from ssis.io.files import whole


class Embeddings:
    """The embeddings of a dataset's images, each computed once.

    An entry on disk is named after the content of the image's file and of SAM's
    weights, so it cannot be stale: another image, or another SAM, has another name. A
    damaged entry is noticed by its checksum and made again.

    Args:
        sam: `ssis.sam.SegmentAnything`.
        dataset: `datasets.dataset.Dataset`.
        cache: folder for the embeddings; empty: none are kept on disk.
        cache_gb, memory_gb: limits of the folder and of the memory, 10^9 bytes.
        world_size: number of processes; each may use its part of the limits.

    Attributes:
        encoded: how many images were encoded so far.
        limit: of memory or folder, the larger one, in bytes.

    Raises:
        UserError: the folder cannot be used.
    """

    def __init__(
        self,
        sam,
        dataset,
        cache: str = "",
        cache_gb: float = 50.0,
        memory_gb: float = 2.0,
        world_size: int = 1,
    ):
        self.sam, self.dataset = sam, dataset
        self.memory: dict[int, Tensor] = {}
        self.folder = Path(cache) if cache else None
        # Processes do not tell each other what they keep, so each has a part.
        self.room_in_memory = memory_gb * 1e9 / world_size
        self.room_on_disk = cache_gb * 1e9 / world_size
        self.limit = 1e9 * max(memory_gb, cache_gb if cache else 0)
        self.encoded = 0
        if self.folder:
            # What earlier runs have left in the folder counts towards its limit.
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                used = sum(f.stat().st_size for f in self.folder.glob("*.sam"))
            except OSError as error:
                raise UserError(
                    f"--sam-cache {self.folder}: cannot be used ({error.strerror})"
                ) from error
            self.room_on_disk -= used / world_size

    def shortage(self) -> str:
        """A line where the embeddings cannot all be kept; empty where they can."""
        images, entry = len(self.dataset), self.sam.entry_bytes
        kept = int(self.limit // entry)
        if kept >= images:
            return ""
        return (
            f"SAM's embeddings of {kept:,} of {images:,} images can be kept "
            f"({entry / 1e6:.2g} MB each), the others are made again whenever they are "
            "needed; give --sam-cache FOLDER --sam-cache-gb "
            f"{math.ceil(images * entry / 1e9)}, and fill it ahead: python -m ssis sam "
            "encode, with the flags of this run"
        )

    def __getitem__(self, index: int) -> Tensor:
        """The embedding of image `index`: (D, cells, cells) float16, on the CPU."""
        if index in self.memory:
            return self.memory[index]
        embedding = self.load(index)
        if self.takes(embedding.numel() * embedding.element_size()):
            self.memory[index] = embedding
        return embedding

    def takes(self, size: int) -> bool:
        """Whether there is room in memory for so many bytes, which are then taken.

        No entry ever makes room for another: images come in random order, so any other
        one may be needed next, and replacing entries would only cost time.
        """
        fits = size <= self.room_in_memory
        self.room_in_memory -= size if fits else 0
        return fits

    def load(self, index: int) -> Tensor:
        """The embedding from disk, or else from the encoder."""
        path = self.entry(index)
        embedding = read_entry(path, self.sam.cells) if path else None
        if embedding is None:
            embedding = self.sam.encode(self.dataset.image(index))
            self.encoded += 1
            # Where the folder is full, nothing is written and 0 bytes are taken.
            if path:
                self.room_on_disk -= write_entry(path, embedding, self.room_on_disk)
        return embedding

    def entry(self, index: int) -> Path | None:
        """The file of an entry, there or not; None without a cache on disk."""
        if self.folder is None:
            return None
        # Both contents go into the name, so no entry is ever out of date.
        name = hashlib.blake2b(self.sam.fingerprint.encode(), digest_size=16)
        name.update(Path(self.dataset.path(index)).read_bytes())
        return self.folder / f"{name.hexdigest()}.sam"


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
