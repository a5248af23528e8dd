r"""The built-in dataset: drawn scenes with exact masks, in COCO format.

Why a dataset of our own: a method that needs a download, a license and eight GPUs
before it shows anything cannot be taught or tested. These scenes are learnable from
scratch in minutes on a CPU and leave room for semi-supervised learning: they are small
(96 x 96), but instances overlap, occlude one another, are rotated and stretched, have
textures in colors that say nothing about their class, and lie on clutter.

How a scene is made: a background, then 1 to 4 shapes painted from back to front. A
shape is a polygon; a pixel belongs to it when its center does (even-odd rule), so a
mask is exact by definition. Later shapes take their pixels from the earlier ones, and a
placement that would hide most of an earlier shape is drawn again: every annotated
instance can be seen.

Same seed, same pixels, on any machine: all random numbers come from numpy's legacy
`RandomState`, whose streams never change, one generator for each image; the polygon
test is done in integers (1/64 pixel), not floating point. A test holds the checksum of
the pixels.

    python -m ssis shapes --out DIR --seed N --images K     makes another one

A `Scenes` describes what is drawn. There are two: this one and that of
`ssis/datasets/signs.py`.

Read next: `ssis/datasets/signs.py`, the other one.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ssis import UserError
from ssis.datasets import rle
from ssis.io import program
from ssis.io.files import write_text

CLASSES = ("circle", "square", "triangle", "star", "cross", "ring")
# Validation chooses settings, test is only for the final table: never the same images.
PARTS = {"train": 1280, "val": 128, "test": 256}
SEED = 0
# Vertices are integers in 1/64 pixel, so that the inside test below is exact.
GRID = 64


def outline(name: str) -> list[tuple[float, float]]:
    """Vertices (x, y) of a class's polygon with circumradius 1, y pointing down.

    Raises:
        ValueError: not one of `CLASSES`.
    """

    def regular(corners: int, radii: tuple[float, ...] = (1.0,)) -> list:
        # Corners at equal angles, the first one on top; radii are used in turn.
        angles = [2 * math.pi * k / corners - math.pi / 2 for k in range(corners)]
        return [
            (radii[k % len(radii)] * math.cos(a), radii[k % len(radii)] * math.sin(a))
            for k, a in enumerate(angles)
        ]

    if name == "circle":
        return regular(32)
    if name == "square":
        return [(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)]
    if name == "triangle":
        return regular(3)
    if name == "ring":
        # Two circles in one outline, joined by a line walked there and back: under the
        # even-odd rule it cancels out.
        inner = [(0.5 * x, 0.5 * y) for x, y in regular(32)]
        return [*regular(32), regular(32)[0], *inner, inner[0]]
    if name == "star":
        return regular(10, radii=(1.0, 0.45))
    if name != "cross":
        raise ValueError(f"no shape {name!r}")
    # The twelve corners of two bars, walked clockwise.
    a, b = 0.32, 0.95
    return [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a),
            (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]  # fmt: skip


def fill(vertices: np.ndarray, size: int) -> np.ndarray:
    """Pixels whose center lies inside a polygon, by the even-odd rule.

    Args:
        vertices: (V, 2) int64, x and y in 1/64 pixel.
        size: side of the square image, pixels.

    Returns:
        (size, size) bool.
    """
    y, x = np.mgrid[:size, :size].astype(np.int64) * GRID + GRID // 2
    inside = np.zeros((size, size), bool)
    # A ray from the center to the right crosses the outline an odd number of times
    # exactly when the center is inside.
    for (x1, y1), (x2, y2) in zip(vertices, np.roll(vertices, -1, axis=0), strict=True):
        spans = (y1 > y) != (y2 > y)
        # Left of the edge or right of it: the sign of a cross product, all integers.
        side = (x - x1) * (y2 - y1) - (y - y1) * (x2 - x1)
        inside ^= spans & ((side < 0) == (y2 > y1))
    return inside


def texture(rng: np.random.RandomState, size: int) -> np.ndarray:
    """A color with stripes, checks or clouds; class-free. (size, size, 3) float."""
    y, x = np.mgrid[:size, :size]
    color, other = rng.randint(30, 226, (2, 3))
    kind, period = rng.randint(4), rng.randint(4, 9)
    if kind == 0:
        # Stripes along one of the axes or diagonals.
        a, b = ((1, 0), (0, 1), (1, 1), (1, -1))[rng.randint(4)]
        blend = ((a * x + b * y) // (period // 2) % 2).astype(float)
    elif kind == 1:
        blend = ((x // period + y // period) % 2).astype(float)
    elif kind == 2:
        # Clouds: a coarse grid of random values, enlarged.
        coarse = rng.randint(0, 101, (size // period + 1,) * 2) / 100.0
        blend = np.kron(coarse, np.ones((period, period)))[:size, :size]
    else:
        blend = np.zeros((size, size))
    # Only a part of the way to the other color: the texture must not hide the outline
    # altogether.
    strength = 0.1 + 0.25 * rng.random_sample()
    return color + (blend * strength)[..., None] * (other - color)


class Scenes(NamedTuple):
    """What a drawn dataset shows.

    Attributes:
        name: of the dataset.
        classes: their names; class k is `classes[k - 1]`.
        outline: class name -> vertices (x, y) of its polygon, circumradius 1.
        texture: (random numbers, side) -> a surface (side, side, 3) float.
        size: side of the square images, pixels.
        radius: smallest circumradius, and how much larger the largest is; as fractions
            of the size.
        counts: fewest instances, and one more than the most.
    """

    name: str
    classes: tuple[str, ...]
    outline: Callable[[str], list[tuple[float, float]]]
    texture: Callable[[np.random.RandomState, int], np.ndarray]
    size: int
    radius: tuple[float, float]
    counts: tuple[int, int]


SHAPES = Scenes("shapes", CLASSES, outline, texture, 96, (0.10, 0.14), (1, 5))


def draw_shape(rng: np.random.RandomState, label: int, scenes: Scenes) -> np.ndarray:
    """A random placement of a class (1..C): its full mask, (size, size) bool."""
    size, (smallest, more) = scenes.size, scenes.radius
    radius = size * (smallest + more * rng.random_sample())
    stretch = 0.85 + 0.3 * rng.random_sample()
    # Up to 30 degrees either way. With a full turn the small model needs hours, not
    # minutes (docs/log.md).
    angle = math.radians(60 * rng.random_sample() - 30)
    center = (0.1 + 0.8 * rng.random_sample(2)) * size
    points = np.array(scenes.outline(scenes.classes[label - 1])) * (
        radius * stretch,
        radius / stretch,
    )
    turn = [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
    return fill(
        np.rint((points @ np.array(turn) + center) * GRID).astype(np.int64), size
    )


def draw_scene(
    seed: int, part: int, index: int, scenes: Scenes = SHAPES
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One scene; a pure function of its arguments.

    Args:
        seed: the dataset's seed, >= 0.
        part: number of the part (train 0, val 1, test 2).
        index: number of the image in its part.
        scenes: what is drawn.

    Returns:
        image (size, size, 3) uint8; masks (N, size, size) bool, disjoint; labels (N,)
        int, 1..C.
    """
    rng = np.random.RandomState([seed, part, index])
    size = scenes.size
    image = scenes.texture(rng, size)
    masks, full_areas, labels = [], [], []
    for _ in range(rng.randint(*scenes.counts)):
        label = rng.randint(1, len(scenes.classes) + 1)
        # A few tries for a place that leaves everything painted so far recognizable.
        for _ in range(8):
            mask = draw_shape(rng, label, scenes)
            clear = all(
                (old & ~mask).sum() >= 0.5 * area
                for old, area in zip(masks, full_areas, strict=True)
            )
            if clear and mask.sum() >= 60:
                break
        else:
            continue
        # Paint: the new shape is in front, so the earlier masks lose those pixels.
        paint = scenes.texture(rng, size)
        image = np.where(mask[..., None], paint, image)
        masks = [old & ~mask for old in masks] + [mask]
        full_areas.append(mask.sum())
        labels.append(label)
    # Sensor noise, so that no two pixels of a flat color are equal.
    image = image + rng.randint(-12, 13, image.shape)
    return (
        np.clip(image, 0, 255).astype(np.uint8),
        np.array(masks, bool).reshape(-1, size, size),
        np.array(labels, int),
    )


def describe(scenes: Scenes, part: str, seed: int, images: int) -> str:
    """The description in the JSON of a part, by which `make` knows it again."""
    return f"ssis {scenes.name}, {part}, seed {seed}, {images} images"


def write_part(folder: Path, part: str, seed: int, images: int, scenes: Scenes) -> Path:
    """Draw one part and write it in COCO format; returns the path of its JSON.

    The JSON is written last and renamed into place: where it exists, the images do.
    """
    (folder / part).mkdir(parents=True, exist_ok=True)
    number = list(PARTS).index(part)
    records, annotations = [], []
    for index in range(images):
        image, masks, labels = draw_scene(seed, number, index, scenes)
        name = f"{index:05d}.png"
        Image.fromarray(image).save(folder / part / name)
        side = scenes.size
        records.append(dict(id=index + 1, file_name=name, width=side, height=side))
        for mask, label in zip(masks, labels, strict=True):
            ids = dict(id=len(annotations) + 1, image_id=index + 1)
            annotations.append(rle.annotation(rle.encode(mask), label, **ids))
    categories = [dict(id=k, name=name) for k, name in enumerate(scenes.classes, 1)]
    info = dict(description=describe(scenes, part, seed, images))
    path = folder / f"instances_{part}.json"
    content = dict(
        info=info, images=records, annotations=annotations, categories=categories
    )
    write_text(path, json.dumps(content))
    return path


def make(
    folder: Path,
    seed: int = SEED,
    parts: dict[str, int] | None = None,
    scenes: Scenes = SHAPES,
) -> None:
    """Write the parts that are not there yet under `folder`.

    Args:
        folder: of the dataset.
        seed: of the scenes, >= 0.
        parts: part -> number of images; None: `PARTS`.
        scenes: what is drawn.

    Raises:
        UserError: a part is there with another seed or size, or cannot be written.
    """
    for part, images in (parts or PARTS).items():
        path = Path(folder) / f"instances_{part}.json"
        try:
            if not path.exists():
                write_part(Path(folder), part, seed, images, scenes)
                continue
            present = json.loads(path.read_text())["info"]["description"]
        except OSError as error:
            raise UserError(
                f"{path}: cannot write the {scenes.name} dataset ({error.strerror}); "
                "choose another folder"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not a {scenes.name} dataset; remove it"
            ) from error
        # Silently training on another dataset than the one asked for would be worse.
        if present != describe(scenes, part, seed, images):
            raise UserError(
                f"{path}: holds '{present}', asked for seed {seed} with {images} "
                "images; remove it or choose another folder"
            )


def main(argv: list[str] | None = None) -> None:
    """The command line: make a dataset of K training images, and its other parts."""
    parser = argparse.ArgumentParser(
        prog="python -m ssis shapes",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=SEED, help="any number >= 0")
    parser.add_argument(
        "--images",
        type=int,
        default=PARTS["train"],
        help="training images; val and test keep their sizes",
    )
    args = parser.parse_args(argv)
    try:
        if args.seed < 0 or args.images < 1:
            raise UserError("--seed must be >= 0 and --images >= 1")
        make(args.out, args.seed, {**PARTS, "train": args.images})
    except UserError as error:
        program.give_up(error)
    print(f"wrote {args.out}: {', '.join(f'instances_{part}.json' for part in PARTS)}")
