r"""Are images of two parts the same pictures? Asked before a study is believed.

    python docs/bench/near_duplicates.py FOLDER [--parts train test]
    python docs/bench/near_duplicates.py FOLDER --copies

The first prints the pairs that look most alike, and in how many of their bits the perceptual hashes
of `ssis/datasets/copies.py` differ, also mirrored and turned by quarters; below a fifth they count
as copies. The second makes copies of every tenth training image, and prints which share of each
kind is found. FOLDER holds `instances_<part>.json` and `images/`, or a folder of each part.
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from ssis.datasets.copies import FEW, SIDE, views

SHOWN = 5


def compressed(image: Image.Image) -> Image.Image:
    """By JPEG, at a low quality."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=40)
    return Image.open(file)


def inner(image: Image.Image, margin: float) -> Image.Image:
    """Without a margin, a fraction of the sides, all around."""
    width, height = image.size
    box = (margin * width, margin * height, (1 - margin) * width, (1 - margin) * height)
    return image.crop(tuple(map(round, box)))


CHANGES = {
    "JPEG, quality 40": compressed,
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "a square of 300": lambda image: image.resize((300, 300)),
    "30 % brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.3),
    "30 % darker": lambda image: ImageEnhance.Brightness(image).enhance(0.7),
    "blurred, 2 pixels": lambda image: image.filter(ImageFilter.GaussianBlur(2)),
    "turned by 5 degrees": lambda image: image.rotate(5),
    "turned by 10 degrees": lambda image: image.rotate(10),
    "cropped by 2 %": lambda image: inner(image, 0.02),
    "cropped by 5 %": lambda image: inner(image, 0.05),
    "cropped by 10 %": lambda image: inner(image, 0.10),
}


def files_of(folder: Path, part: str) -> list[Path]:
    """The image files of a part."""
    records = json.loads((folder / f"instances_{part}.json").read_text())["images"]
    root = folder / "images" if (folder / "images").is_dir() else folder / part
    return [root / record["file_name"] for record in records]


def different(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """(N, M) fraction of bits in which the closest views of two sets of hashes differ."""
    return (1 - np.einsum("nvb,mb->nvm", one, two[:, 0]).max(axis=1) / SIDE**2) / 2


def hashes(paths: list) -> np.ndarray:
    """(N, 8, 256) of `copies.views`."""
    return np.stack([views(str(path)) for path in paths])


def main() -> None:
    """Print the most similar pairs, or how copies are found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", nargs=2, default=["train", "test"])
    parser.add_argument("--copies", action="store_true")
    args = parser.parse_args()
    if args.copies:
        paths = files_of(args.folder, "train")[::10]
        originals = hashes(paths)
        for name, change in CHANGES.items():
            made = []
            for path in paths:
                file = io.BytesIO()
                change(Image.open(path).convert("RGB")).save(file, "PNG")
                made.append(views(file))
            gap = different(np.stack(made), originals).diagonal()
            print(f"{(gap < FEW).mean():4.0%} found, median of bits {np.median(gap):.2f}  {name}")
        return
    one, two = (files_of(args.folder, part) for part in args.parts)
    gap = different(hashes(one), hashes(two))
    if args.parts[0] == args.parts[1]:
        gap[np.tril_indices(len(one))] = 1
    found = (gap < FEW).sum()
    print(f"{args.parts}: {len(one)} and {len(two)} images; {found} pairs below {FEW}")
    for flat in np.argsort(gap, axis=None)[: SHOWN + found]:
        i, j = np.unravel_index(flat, gap.shape)
        print(f"{gap[i, j]:.3f}  {one[i].name}  {two[j].name}")


if __name__ == "__main__":
    main()
