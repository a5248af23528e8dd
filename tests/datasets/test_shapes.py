"""The built-in dataset: same pixels on any machine, exact disjoint masks, COCO format.

Oracles: a checksum of the pixels, matplotlib's point-in-polygon, pycocotools.
"""

import hashlib
import json

import numpy as np
import pytest
from matplotlib.path import Path as Polygon
from PIL import Image
from pycocotools.coco import COCO

from ssis import UserError
from ssis.config import parse
from ssis.datasets import parts, shapes, signs

pytestmark = pytest.mark.fast
# sha256 of 20 scenes of each part, images, masks and labels, with seed 0.
DIGEST = "024f98adadb99788bef55b71cbef70b0cc0b9171a42cb7373f4a51b7caeceea3"


def test_same_seed_same_pixels_on_any_machine():
    digest = hashlib.sha256()
    for part in range(3):
        for index in range(20):
            for array in shapes.draw_scene(0, part, index):
                digest.update(np.ascontiguousarray(array).astype(np.uint8).tobytes())
    assert digest.hexdigest() == DIGEST


def test_fill_agrees_with_another_point_in_polygon_test():
    rng = np.random.RandomState(1)
    for name in shapes.CLASSES:
        corners = np.array(shapes.outline(name)) * (13.3, 17.1) + 20 + rng.random_sample(2)
        vertices = np.rint(corners * shapes.GRID).astype(np.int64)
        y, x = np.mgrid[:40, :40] + 0.5
        inside = Polygon(vertices / shapes.GRID).contains_points(
            np.stack([x, y], -1).reshape(-1, 2)
        )
        assert (shapes.fill(vertices, 40) == inside.reshape(40, 40)).mean() > 0.998


def test_masks_are_disjoint_and_every_instance_can_be_seen():
    sizes = []
    for index in range(60):
        image, masks, labels = shapes.draw_scene(3, 0, index)
        assert image.shape == (96, 96, 3) and image.dtype == np.uint8
        assert len(masks) == len(labels) >= 1
        assert masks.sum(axis=0).max() <= 1
        assert set(labels) <= set(range(1, 7))
        sizes += masks.sum(axis=(1, 2)).tolist()
    # Occlusion may take half of the smallest shape (60 pixels), more never.
    assert min(sizes) >= 30


def test_the_second_dataset_has_other_scenes_of_the_same_kind(tmp_path, monkeypatch):
    seen = set()
    for index in range(60):
        image, masks, labels = shapes.draw_scene(0, 0, index, signs.SIGNS)
        assert image.shape == (112, 112, 3) and 1 <= len(masks) == len(labels) <= 5
        assert masks.sum(axis=0).max() <= 1 and masks.sum(axis=(1, 2)).min() >= 30
        seen |= set(labels)
    assert seen == set(range(1, 7)) and not set(signs.CLASSES) & set(shapes.CLASSES)
    # Outlines have a circumradius of about 1, as those of the first dataset.
    for name in signs.CLASSES:
        assert 0.9 < np.hypot(*np.array(signs.outline(name)).T).max() < 1.2
    # The preset draws it.
    monkeypatch.setattr(shapes, "PARTS", dict(train=2, val=1, test=1))
    settings = parse(["--preset", "signs", "--data", str(tmp_path), "--method", "supervised"])
    parts.prepare(settings)
    assert parts.open_parts(settings)[0].names == list(signs.CLASSES)


def test_the_parts_and_seeds_differ():
    images = [shapes.draw_scene(*key)[0] for key in ((0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1))]
    for a in range(4):
        for b in range(a):
            assert (images[a] != images[b]).any()


def test_the_written_json_is_what_was_drawn(tmp_path, capsys):
    shapes.make(tmp_path, seed=5, parts=dict(train=4, val=2, test=2))
    coco = COCO(str(tmp_path / "instances_train.json"))
    capsys.readouterr()
    for index in range(4):
        image, masks, labels = shapes.draw_scene(5, 0, index)
        record = coco.imgs[index + 1]
        assert (np.array(Image.open(tmp_path / "train" / record["file_name"])) == image).all()
        annotations = coco.imgToAnns[index + 1]
        assert [a["category_id"] for a in annotations] == labels.tolist()
        for annotation, mask in zip(annotations, masks, strict=True):
            assert (coco.annToMask(annotation) == mask).all()
            assert annotation["area"] == mask.sum()


def test_another_dataset_in_the_folder_is_not_taken_for_this_one(tmp_path):
    parts = dict(train=2, val=1, test=1)
    shapes.make(tmp_path, seed=1, parts=parts)
    shapes.make(tmp_path, seed=1, parts=parts)
    with pytest.raises(UserError, match="asked for seed 2"):
        shapes.make(tmp_path, seed=2, parts=parts)
    (tmp_path / "instances_val.json").write_text("{}")
    with pytest.raises(UserError, match="not a shapes dataset"):
        shapes.make(tmp_path, seed=1, parts=parts)


def test_an_unknown_shape_is_an_error():
    with pytest.raises(ValueError, match="no shape 'pentagon'"):
        shapes.outline("pentagon")


def test_the_command_makes_another_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shapes, "PARTS", dict(train=5, val=2, test=4))
    shapes.main(["--out", str(tmp_path), "--seed", "9", "--images", "3"])
    assert "wrote" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "instances_train.json").read_text())["images"]) == 3
    assert len(json.loads((tmp_path / "instances_test.json").read_text())["images"]) == 4
    with pytest.raises(SystemExit) as stop:
        shapes.main(["--out", str(tmp_path), "--images", "0"])
    assert stop.value.code == 2
