r"""The bytes of a checkpoint: written whole, checked, read without running code.

*Atomically*: a checkpoint is written beside the old one, forced to disk, and takes its
place; the old one is kept as `checkpoint.previous.pt`. Whenever the machine dies, there
is a complete file.

*Checked*: a file can be complete and wrong, if a disk or a copy damages it. PyTorch's
reader does not look at the checksums that its writer puts in (one bit changed in a
file of 38 MB: read without complaint, 40 times of 40); we do. A damaged checkpoint is
named and the previous one is used.

A checkpoint is tensors and plain containers only, and is read with
`weights_only=True`: loading a stranger's checkpoint must not run the stranger's code.
What is in one: `ssis/engine/resume.py`.

Read next: `ssis/io/files.py`, how any file is written whole.
"""

import os
import sys
import zipfile
from pathlib import Path

import torch
from torch import nn

from ssis import UserError
from ssis.io.files import force_to_disk, whole

# Raised when the meaning of a field changes.
FORMAT = 2
# What no checkpoint of this project is without.
KEYS = {"format", "config", "names", "student", "teacher"}


def previous(path: Path) -> Path:
    """Where the checkpoint before `path` is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def keep(path: Path) -> None:
    """Give a checkpoint its second name, under which it stays when it is replaced."""
    spare = path.with_name(path.name + ".previous.tmp")
    spare.unlink(missing_ok=True)
    try:
        # Two names for one file: `path` is there at every moment.
        os.link(path, spare)
        spare.replace(previous(path))
    except OSError:
        # A file system without such links: for a moment only the previous one is there.
        path.replace(previous(path))


def save(path: Path, state: dict) -> None:
    """Write a checkpoint; the one before stays until this one is complete, and then
    under its other name.

    Raises:
        UserError: disk full or folder not writable; the old checkpoint is untouched.
    """
    try:
        with whole(path) as temporary:
            torch.save(dict(state, format=FORMAT), temporary)
            # Before the old one moves to its other name, the new one is complete.
            force_to_disk(temporary)
            if path.exists():
                keep(path)
    # torch.save reports a full disk as a RuntimeError of its zip writer.
    except (OSError, RuntimeError) as error:
        kept = "the one before is kept" if path.exists() else "there is none yet"
        raise UserError(
            f"{path}: the checkpoint cannot be written ({short(error)}); {kept}; "
            "make room or choose another --output, then run the same command again"
        ) from error


def short(error: BaseException) -> str:
    """The first line of an error's text."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.strip().splitlines()[0]


def load(path: Path) -> dict:
    """Read a checkpoint onto the CPU.

    Raises:
        UserError: not there, damaged, not a checkpoint of this project, or with code.
    """
    kept = previous(Path(path))
    advice = f"; the one before it is {kept}" if kept.exists() else ""
    try:
        # The checksum of every tensor in the file, which is a zip archive.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise UserError(f"{path}: damaged (checksum of {damaged} differs){advice}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: checkpoint not found{advice}") from error
    except UserError:
        raise
    # Every exception: a damaged file can make the reader fail in any way.
    except Exception as error:
        raise UserError(
            f"{path}: cannot be read as a checkpoint ({short(error)[:120]}){advice}"
        ) from error
    if not isinstance(state, dict) or not KEYS <= state.keys():
        raise UserError(f"{path}: not a checkpoint of this project")
    if state["format"] != FORMAT:
        raise UserError(
            f"{path}: format {state['format']}, this version reads {FORMAT}; use the "
            "version that wrote it"
        )
    return state


def latest(path: Path) -> Path | None:
    """The checkpoint to go on from: `path`, or the one before it if `path` is damaged
    or missing; None if there is neither.

    Raises:
        UserError: what there is cannot be read. A run is never begun anew in silence.
    """
    said = []
    for place in (path, previous(path)):
        if not place.exists():
            continue
        try:
            load(place)
        except UserError as error:
            said.append(str(error))
            continue
        if place != path:
            lost = said[0] if said else f"{path}: missing; the one before it is {place}"
            print(f"warning: {lost}; going on from it", file=sys.stderr)
        return place
    if said:
        raise UserError(
            f"{said[0]}; there is none to go on from; give --resume never to start anew"
        )
    return None


def load_weights(model: nn.Module, weights: dict, path: Path) -> None:
    """Load weights that must fit exactly.

    Raises:
        UserError: they belong to another model; names the first misfit.
    """
    check_fits(model.state_dict(), weights, f"{path}: checkpoint of another model")
    model.load_state_dict(weights)


def check_fits(own: dict, given: dict, message: str) -> None:
    """Whether two state dicts have the same names and shapes.

    Raises:
        UserError: they have not; `message`, and the first name that does not fit.
    """
    misfit = sorted(own.keys() ^ given.keys()) or [
        name for name in own if own[name].shape != given[name].shape
    ]
    if misfit:
        raise UserError(f"{message}: {misfit[0]!r} does not fit")
