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
    r"""A photo's own name: what follows the last `/`, `\` or `=`; `%20` is a space."""
    return re.split(r"[/\\=]", unquote(name))[-1]


def nearest(name: str, folder: Path) -> str:
    """The image under a folder whose name is most like that of a missing one, or ""."""
    found = images_under(folder)
    same = [other for other in found if last_part(other) == last_part(name)]
    return next(iter(same or difflib.get_close_matches(name, found, 1)), "")


def match(records: list[dict], folder: Path, source: str) -> int:
    """Give each image record the name, under `folder`, of the one file that it means.

    Names that are there stay. For the others the last part counts, with or without the
    eight digits that Label Studio puts in front of an uploaded file's name.

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
    for name in images_under(folder):
        found.setdefault(last_part(name), []).append(name)
    there = {name for names in found.values() for name in names}
    changed = 0
    for record in records:
        name = str(record.get("file_name"))
        if name in there:
            continue
        last = last_part(name)
        files = found.get(last) or found.get(re.sub(r"^[0-9a-f]{8}-", "", last)) or []
        if len(files) != 1:
            said = f"{len(files)} images" if files else "no image"
            close = nearest(name, folder)
            raise UserError(
                f"{source}: file_name {name!r}: {said} of this name under {folder}"
                + (f"; the nearest is {close!r}" if close and not files else "")
            )
        record["file_name"] = files[0]
        changed += 1
    return changed
