r"""Writing files: whole or not at all, and one line when it cannot be done.

A program can be killed between any two bytes that it writes, and a reader cannot tell
half a file from a complete one. So no half file ever stands in its place: a file is
written beside it, forced to disk, and renamed, which a file system does in one step.

Read next: `ssis/engine/run_folder.py`, the files of a run.
"""

import contextlib
import os
from pathlib import Path

from ssis import UserError


@contextlib.contextmanager
def whole(path: Path):
    """Yield a path to write a file or a link to; it then takes its place at `path`.

    What was at `path` before stays until then, and for good if the block raises.
    """
    # With the process's number: two programs may write the same file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        # A link has no content of its own.
        if not temporary.is_symlink():
            force_to_disk(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def force_to_disk(path: Path) -> None:
    """Wait until a file's content is on the disk.

    Without it the disk may store the new name before the data, and a power cut between
    the two leaves an empty file that looks complete.
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
