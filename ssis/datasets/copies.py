r"""Copies of one picture: they must not lie on both sides of training and judging.

A model that has trained on a copy of a validation image is judged by an image that it
has memorized. Real folders hold such copies, and not only as equal files: Roboflow
exports three augmented versions of each photo, frames of a film follow each other by a
fraction of a second, and a tool compresses anew what it exports. They are recognized

* by name: `photo_jpg.rf.<hash>.jpg` is a version of `photo`, `clip_frame_0012.png` and
  `clip_mp4-12_jpg.rf.<hash>.jpg` are frames of `clip`; or by an expression of the
  user's (`group_of`);
* by content: the same bytes (`Known`);
* by appearance: perceptual hashes (pHash: the signs of the lowest frequencies of the
  gray picture) that differ in less than a fifth of their bits, also mirrored or turned
  by a quarter (`alike`). Measured on 306 images of nuclei, 299 of blood cells and 598
  photographs (docs/bench/near_duplicates.py): all copies that were compressed, resized,
  brightened or blurred are found, and the only four pairs besides are copies that the
  blood cells really have. A copy that is cropped by 5 % or turned by 10 degrees is not
  found.

Read next: `ssis/tools/prepare_own.py`, which keeps groups together.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from ssis.io.images import read_image

# What Roboflow appends to a photo's name: its extension as a part of it, .rf. and a
# hash; an image that was uploaded once more has it twice.
VERSION = re.compile(r"(.+?)(?:[_-]\w{3,4})?\.rf\.\w+$")
# The number of a frame, after the word or after the film's own extension.
FRAME = re.compile(
    r"(.*?)(?:^|[-_. /])(?:frame|mp4|mov|avi|mkv)[-_. ]*\d+$", re.IGNORECASE
)
# The folders of an export, over which the versions of a photo may be spread.
PART = re.compile(r"^(?:train|valid|val|test)/", re.IGNORECASE)
# Bits of a hash along one side, and the fraction of all in which a copy may differ.
SIDE, FEW = 16, 0.2
# Up to so many unlabeled images are compared by appearance: some 10 ms each whenever a
# run starts.
MANY = 5_000
UNSEEN = (
    "look-alikes of validation and test images are not searched for; identical files "
    "and Roboflow versions still are"
)


def version_of(name: str) -> str:
    """A name without extension; that of its photo for one of Roboflow's versions."""
    stem = os.path.splitext(name)[0]
    while found := VERSION.match(stem):
        stem = PART.sub("", found.group(1))
    return stem


def is_version(name: str) -> bool:
    """Whether a file name is that of one of Roboflow's versions."""
    return bool(VERSION.match(os.path.splitext(name)[0]))


def group_of(name: str, pattern: str = "") -> str:
    """What the copies of a picture have in common in their names.

    Args:
        name: file name relative to the image folder.
        pattern: an expression of the user's, for the name without its extension and
            what Roboflow appends: its first group, or else all it finds, names the
            group; a name in which it finds nothing stands for itself.
    """
    stem = version_of(name)
    if pattern:
        found = re.search(pattern, stem)
        return (
            next(iter(g for g in found.groups() if g), found.group()) if found else name
        )
    if film := FRAME.match(stem):
        # `frame_0012` alone: of the one film that there is.
        return PART.sub("", film.group(1)) or "frames"
    return stem


@lru_cache(maxsize=100_000)
def views(path: str) -> np.ndarray | None:
    """Perceptual hashes of an image file as it is, mirrored, and turned by quarters.

    Returns:
        (8, 256) float32 of -1 and 1, the first as it is; None where the file is no
        image or has one color alone, of which every hash would be the same.

    Raises:
        ImportError: without the package `imagehash`.
    """
    import imagehash

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                # Of 16 bits: Pillow alone would turn them white.
                image = to_pil_image(read_image(path))
            # JPEG is decoded at an eighth of the size where that is enough.
            image.draft("L", (256, 256))
            gray = ImageOps.exif_transpose(image).convert("L")
            gray = gray.resize((96, 96), Image.Resampling.BOX)
    # Every exception: what is wrong with a file is told when the files are checked.
    except Exception:
        return None
    low, high = gray.getextrema()
    if low == high:
        return None
    turned = [gray, gray.transpose(Image.Transpose.ROTATE_90)]
    turned += [ImageOps.mirror(one) for one in turned]
    turned += [one.transpose(Image.Transpose.ROTATE_180) for one in turned]
    bits = [imagehash.phash(one, hash_size=SIDE).hash.reshape(-1) for one in turned]
    return np.stack(bits).astype(np.float32) * 2 - 1


def alike(paths: list[str], others: list[str]) -> list[tuple[int, int]]:
    """Pairs of image files, one of each list, that look like copies of one picture.

    Raises:
        ImportError: without the package `imagehash`.
    """
    every = list(dict.fromkeys([*paths, *others]))
    bar = tqdm(every, unit="image", desc="compare", leave=False, delay=5)
    seen = {path: views(path) for path in bar}
    known = [k for k, path in enumerate(others) if seen[path] is not None]
    if not known:
        return []
    hashes = np.stack([seen[others[k]][0] for k in known])  # (N, 256)
    pairs = []
    for k, path in enumerate(paths):
        if seen[path] is not None:
            # A product of hashes is the number of equal bits less the different ones.
            different = (SIDE**2 - seen[path] @ hashes.T).min(axis=0) / 2
            near = np.flatnonzero(different < FEW * SIDE**2)
            pairs += [(k, known[n]) for n in near.tolist()]
    return pairs


def groups(names: list[str], paths: list[str], pattern: str = "") -> list[int]:
    """For each image the number of its group: that of the group's first image.

    Args:
        names: file names relative to the image folder.
        paths: the files; none: names alone are compared.
        pattern: as for `group_of`; where given, looks do not count.

    Raises:
        ImportError: pictures are to be compared, without the package `imagehash`.
    """
    first: dict[str, int] = {}
    group = [
        first.setdefault(group_of(name, pattern), k) for k, name in enumerate(names)
    ]
    for one, other in alike(paths, paths) if paths and not pattern else []:
        low, high = sorted((group[one], group[other]))
        if low != high:
            group = [low if number == high else number for number in group]
    return group


def versions(paths: list[str], others: list[str]) -> set[int]:
    """Numbers of the images in `paths` that are, by their names, versions of others."""
    names = [os.path.basename(path) for path in others]
    plain = {version_of(name) for name in names}
    augmented = {version_of(name) for name in names if is_version(name)}
    found = set()
    for k, path in enumerate(paths):
        name = os.path.basename(path)
        # Two plain photos of one name, in two folders, may be two photos.
        if version_of(name) in (plain if is_version(name) else augmented):
            found.add(k)
    return found


def leaks(
    paths: list[str], judged: list[str], pattern: str = ""
) -> tuple[set[int], list[str]]:
    """Which unlabeled images are versions or copies of those a model is judged by.

    Frames of one film do not count: without labels they tell less, and often all the
    photos are of one film.

    Args:
        paths, judged: image files.
        pattern: of `--group-by`, with which the annotated images were divided; where
            given, looks do not count, as there.

    Returns:
        Numbers of the images in `paths`, and a warning where looks were not compared.
    """
    found = versions(paths, judged)
    if pattern:
        return found, []
    if len(paths) > MANY:
        return found, [f"more than {MANY} unlabeled images: {UNSEEN}"]
    try:
        return found | {k for k, _ in alike(paths, judged)}, []
    except ImportError:
        return found, [f"without the package imagehash {UNSEEN}; pip install imagehash"]


class Known:
    """Some files, to be found again under other names and as copies.

    Of two files of one size the first and the last 4 kB are compared: little to read
    where there are hundreds of thousands. Only if these are equal (as in uncompressed
    pictures with a black rim), all the bytes are.
    """

    def __init__(self, paths: Iterable[str]):
        self.paths, self.sizes, self.edges, self.sums = set(), {}, {}, {}
        for path in paths:
            # Missing, or no name at all: told when the files are checked.
            with contextlib.suppress(OSError, ValueError):
                self.paths.add(os.path.realpath(path))
                self.sizes.setdefault(os.path.getsize(path), []).append(path)

    def __contains__(self, path: str) -> bool:
        try:
            if os.path.realpath(path) in self.paths:
                return True
            same = self.sizes.get(os.path.getsize(path), [])
            same = [other for other in same if self.edge(other) == self.edge(path)]
            return bool(same) and self.sum(path) in map(self.sum, same)
        except (OSError, ValueError):
            # A broken link or name: no copy, and told when the files are checked.
            return False

    def edge(self, path: str) -> bytes:
        """The first and the last 4 kB of a file."""
        if path not in self.edges:
            with open(path, "rb") as file:
                start = file.read(4096)
                file.seek(max(0, os.path.getsize(path) - 4096))
                self.edges[path] = start + file.read(4096)
        return self.edges[path]

    def sum(self, path: str) -> bytes:
        """A checksum of a whole file."""
        if path not in self.sums:
            self.sums[path] = hashlib.sha256(Path(path).read_bytes()).digest()
        return self.sums[path]
