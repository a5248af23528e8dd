r"""Image names in a JSON, and the files that they mean.

A tool writes the path that an image had where it ran: `images/a1b2c3d4-photo.jpg` and
`/data/local-files/?d=batch/photo.jpg` (Label Studio), `C:\\Users\\...\\photo.jpg`
(labelme), `batch 1/photo.jpg`. Only the last part is sure to be the photo's own name,
and only where one file of that name is there.

Read next: `ssis/datasets/dataset.py`.
"""

import difflib
import re
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from ssis import UserError
from ssis.io.images import IMAGE_TYPES


def safe_name(name, source: str) -> str:
    """A file name from a JSON, or UserError when it leaves the image folder."""
    if not isinstance(name, str) or not name:
        raise UserError(f"{source}: an image has file_name {name!r}; it must be a name")
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in parts.parts[0]:
        raise UserError(
            f"{source}: file_name {name!r} leaves the image folder; make it relative "
            "(python -m ssis prepare own --match-names does)"
        )
    return str(parts)


def images_under(folder: Path) -> list[str]:
    """Names of the image files in a folder and below, relative to it, sorted."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_TYPES and not path.is_dir()
    )


def last_part(name: str) -> str:
    """A photo's own name in a path or an address of any kind; `%20` is a space."""
    name = unquote(name)
    # Label Studio's local files; or what a cloud appends to an address.
    name = name.split("?d=")[1] if "?d=" in name else name.split("?")[0]
    return re.split(r"[/\\]", name)[-1]


def nearest(name: str, folder: Path) -> str:
    """In words: the image whose name is most like that of a missing one; or ""."""
    found = images_under(folder)
    last = last_part(name).casefold()
    same = [other for other in found if PurePosixPath(other).name.casefold() == last]
    if len(same) == 1:
        return f"{same[0]!r}, which prepare own --match-names takes"
    return "".join(map(repr, same[:1] or difflib.get_close_matches(name, found, 1)))


def match(records: list[dict], folder: Path, source: str) -> int:
    """Give each image record the name, under `folder`, of the one file that it means.

    Names that are there stay. For the others the last part counts, with or without the
    eight digits that Label Studio puts in front of an uploaded file's name; and if no
    file has it, without regard to case.

    Args:
        records: `images` of a COCO JSON; their `file_name` is changed.
        folder: the image folder.
        source: the JSON, for messages.

    Returns:
        How many names were changed.

    Raises:
        UserError: no file of that name, or several.
    """
    found: dict[str, list[str]] = {}
    folded: dict[str, list[str]] = {}
    for name in images_under(folder):
        last = PurePosixPath(name).name
        found.setdefault(last, []).append(name)
        folded.setdefault(last.casefold(), []).append(name)
    changed, taken = 0, {}
    for record in records:
        if not isinstance(record, dict) or not isinstance(record.get("file_name"), str):
            raise UserError(f"{source}: an image has no file_name: {record!r:.80}")
        name = record["file_name"]
        if (folder / name).is_file():
            continue
        last = last_part(name)
        files = found.get(last) or found.get(re.sub(r"^[0-9a-f]{8}-", "", last))
        files = files or folded.get(last.casefold()) or []
        if len(files) > 1:
            # Of several the one whose folder has the same name, too.
            ending = re.split(r"[/\\]", unquote(name))[-2:]
            files = [each for each in files if each.split("/")[-2:] == ending] or files
        if len(files) != 1:
            said = f"{len(files)} images" if files else "no image"
            close = nearest(name, folder)
            raise UserError(
                f"{source}: file_name {name!r}: {said} of this name under {folder}"
                + (f"; the nearest is {close}" if close and not files else "")
            )
        if other := taken.get(files[0]):
            raise UserError(
                f"{source}: file_name {name!r} and {other!r} both mean {files[0]!r}; "
                "correct one of them"
            )
        taken[files[0]] = name
        record["file_name"] = files[0]
        changed += 1
    return changed
