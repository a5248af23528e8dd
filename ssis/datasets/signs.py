r"""The second built-in dataset: other classes, sizes and textures, never tuned on.

Settings that were chosen on one dataset fit that dataset. This one tests whether the
methods work beyond it: the generator is that of `ssis/datasets/shapes.py`, the scenes
are others (arrows, hearts, moons, houses, hexagons and hooks; 112 pixels; 2 to 5
smaller instances; gradients and speckles), and no setting was chosen by looking at a
result on them. (When pasting labeled images became the default, for the shapes' sake,
results on these had been seen, too.) The textures use sines, so a pixel may differ by
one gray level from machine to machine; masks do not.

    python train.py --preset signs

Read next: `ssis/datasets/coco_json.py`, which reads what is drawn.
"""

import math

import numpy as np

from ssis.datasets.shapes import Scenes

CLASSES = ("arrow", "heart", "moon", "house", "hexagon", "hook")
POLYGONS = {
    "arrow": [(0, -1), (0.7, -0.1), (0.28, -0.1), (0.28, 0.9), (-0.28, 0.9),
              (-0.28, -0.1), (-0.7, -0.1)],
    "house": [(0, -1), (0.75, -0.25), (0.75, 0.75), (-0.75, 0.75), (-0.75, -0.25)],
    "hook": [(-0.7, -0.9), (-0.2, -0.9), (-0.2, 0.4), (0.75, 0.4), (0.75, 0.9),
             (-0.7, 0.9)],
}  # fmt: skip


def outline(name: str) -> list[tuple[float, float]]:
    """Vertices (x, y) of a class's polygon, circumradius about 1, y pointing down."""
    turns = [2 * math.pi * k / 36 for k in range(36)]
    if name == "hexagon":
        return [(math.cos(a), math.sin(a)) for a in turns[::6]]
    if name == "heart":
        # The textbook curve, scaled from 16 to 1 and turned upright.
        return [
            (
                math.sin(a) ** 3,
                (2 * math.cos(3 * a) + math.cos(4 * a) - 13 * math.cos(a)) / 16
                + 5 * math.cos(2 * a) / 16,
            )
            for a in turns
        ]
    if name == "moon":
        # Out along a circle from horn to horn, back along a flatter arc.
        outer = [math.radians(k) for k in range(60, 301, 10)]
        back = [math.radians(k) for k in range(290, 60, -10)]
        horn = math.sin(outer[0])
        # The inner arc, a flattened half-circle between the same horns.
        inner = [
            (0.5 - 0.75 * max(0.0, -math.cos(a)) ** 0.7, horn * math.sin(a))
            for a in back
            if math.cos(a) < 0
        ]
        return [(math.cos(a), math.sin(a)) for a in outer] + inner
    return POLYGONS[name]


def texture(rng: np.random.RandomState, size: int) -> np.ndarray:
    """A gradient with speckles or waves; class-free. (size, size, 3) float."""
    y, x = np.mgrid[:size, :size] / size
    color, other = rng.randint(30, 226, (2, 3))
    angle = 2 * math.pi * rng.random_sample()
    along = x * math.cos(angle) + y * math.sin(angle)
    kind = rng.randint(3)
    if kind == 0:
        blend = along % 1.0
    elif kind == 1:
        # Speckles: single pixels and pairs.
        blend = (rng.random_sample((size, size)) < 0.15).astype(float)
    else:
        wave = rng.randint(6, 15)
        blend = 0.5 + 0.5 * np.sin(2 * math.pi * wave * along)
    strength = 0.15 + 0.25 * rng.random_sample()
    return color + (blend * strength)[..., None] * (other - color)


SIGNS = Scenes("signs", CLASSES, outline, texture, 112, (0.08, 0.12), (2, 6))
