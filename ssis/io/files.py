r"""Writing files: whole or not at all, and one line when it cannot be done.

A program can be killed between any two bytes that it writes. Whoever finds the file
later takes half of it for all of it, unless there is never a half: it is written beside
its place, forced to disk, and renamed, which a file system does in one go.

Read next: `ssis/engine/run_folder.py`, the files of a run.
"""

import contextlib
import os
from pathlib import Path

from ssis import UserError


@contextlib.contextmanager
def whole(path: Path):
    """Gives a path to write; at the end of the block the file takes its place.

    What was at `path` before stays until then, and for good if the block raises.
    """
    # The process's number: two programs may write the same file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        force_to_disk(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def force_to_disk(path: Path) -> None:
    """Wait until a file's content is on the disk.

    Rename first, power cut, data never written: a complete name on an empty file. fsync
    forbids that order.
    """
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def writing(path: Path, flag: str = "--output"):
    """Turn a failure to write `path`, below the folder of `flag`, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); make room or "
            f"choose another {flag}, then run the same command again"
        ) from error
