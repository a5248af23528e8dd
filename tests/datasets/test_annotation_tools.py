"""COCO JSON as annotation tools write it: CVAT, Label Studio, labelme2coco, Roboflow.

Each file is written here in the tool's own form (field by field after its exports), with
the same two instances; the oracle is the polygon's mask by pycocotools.
"""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils

from ssis import UserError
from ssis.datasets import coco_json

pytestmark = pytest.mark.fast
# Two instances on an image of 40 x 60 (height x width): a nucleus and a cell.
POLYGONS = [[5.5, 5.25, 25.0, 6.0, 24.0, 20.0, 6.0, 19.5], [30, 10, 50, 10, 50, 35, 30, 35]]


def cvat(name: str) -> dict:
    return dict(
        licenses=[dict(name="", id=0, url="")],
        info=dict(contributor="", date_created="", description="", url="", version="", year=""),
        categories=[dict(id=k, name=n, supercategory="") for k, n in ((1, "cell"), (2, "nucleus"))],
        images=[dict(id=1, width=60, height=40, file_name=name, license=0, flickr_url="",
                     coco_url="", date_captured=0)],
        annotations=[
            dict(id=k + 1, image_id=1, category_id=2 - k, segmentation=[polygon], area=266.25,
                 bbox=[5.5, 5.25, 19.5, 14.75], iscrowd=0,
                 attributes=dict(occluded=False, rotation=0.0))
            for k, polygon in enumerate(POLYGONS)
        ],
    )  # fmt: skip


def label_studio(name: str) -> dict:
    # Ids from 0, Windows' separators, no area that could be trusted, `ignore`.
    return dict(
        images=[dict(width=60, height=40, id=0, file_name=name.replace("/", "\\"))],
        categories=[dict(id=0, name="cell"), dict(id=1, name="nucleus")],
        annotations=[
            dict(id=k, image_id=0, category_id=1 - k, segmentation=[polygon],
                 bbox=[5.5, 5.25, 19.5, 14.75], ignore=0, iscrowd=0, area=287.625)
            for k, polygon in enumerate(POLYGONS)
        ],
        info=dict(year=2026, version="1.0", description="", contributor="Label Studio",
                  url="", date_created="2026-11-21 10:00:00.000000"),
    )  # fmt: skip


def labelme2coco(name: str) -> dict:
    # No info, no licenses; whole numbers as floats.
    return dict(
        images=[dict(height=40.0, width=60.0, id=1, file_name=name)],
        categories=[dict(id=k, name=n, supercategory=n) for k, n in enumerate(("cell", "nucleus"))],
        annotations=[
            dict(iscrowd=0, image_id=1, bbox=[5, 5, 20, 15], segmentation=[polygon],
                 category_id=1 - k, id=k + 1, area=270)
            for k, polygon in enumerate(POLYGONS)
        ],
    )  # fmt: skip


def roboflow(name: str) -> dict:
    # A category 0 that stands for the project: nothing belongs to it.
    return dict(
        info=dict(year="2026", version="3", description="Exported from roboflow.com",
                  contributor="", url="https://public.roboflow.com/object-detection/undefined",
                  date_created="2026-11-21T10:00:00+00:00"),
        licenses=[dict(id=1, url="", name="Unknown")],
        categories=[dict(id=0, name="cells", supercategory="none"),
                    dict(id=1, name="cell", supercategory="cells"),
                    dict(id=2, name="nucleus", supercategory="cells")],
        images=[dict(id=0, license=1, file_name=name, height=40, width=60,
                     date_captured="2026-11-21T10:00:00+00:00", extra=dict(name="a.jpg"))],
        annotations=[
            dict(id=k, image_id=0, category_id=2 - k, bbox=[5.5, 5.25, 19.5, 14.75],
                 area=287.625, segmentation=[polygon], iscrowd=0)
            for k, polygon in enumerate(POLYGONS)
        ],
    )  # fmt: skip


def strings(name: str) -> dict:
    # Ids as strings, of some converters; an id's type differs from list to list.
    return dict(
        images=[dict(id="7", file_name=name, height=40, width=60)],
        categories=[dict(id="2", name="cell"), dict(id="10", name="nucleus")],
        annotations=[
            dict(id=str(k), image_id=(7, "7")[k], category_id=("10", 2)[k], segmentation=[polygon])
            for k, polygon in enumerate(POLYGONS)
        ],
    )


def write(folder, make) -> str:
    name = "batch one/a.png"
    (folder / "images" / "batch one").mkdir(parents=True)
    Image.new("RGB", (60, 40)).save(folder / "images" / name)
    (folder / "tool.json").write_text(json.dumps(make(name)))
    return str(folder / "tool.json")


@pytest.mark.parametrize("make", [cvat, label_studio, labelme2coco, roboflow, strings])
def test_the_files_of_annotation_tools_are_read(make, tmp_path):
    dataset = coco_json.load_coco(write(tmp_path, make), str(tmp_path / "images"))
    dataset.check_files()
    assert dataset.names == ["cell", "nucleus"]
    target = dataset.target(0)
    assert target["labels"].tolist() == [2, 1]
    for mask, polygon in zip(target["masks"].numpy(), POLYGONS, strict=True):
        expected = mask_utils.decode(mask_utils.frPyObjects([polygon], 40, 60))[..., 0]
        assert (mask == expected).all() and mask.sum() > 200
    # The boxes are those of the masks, whatever the file says.
    ys, xs = np.where(target["masks"][0].numpy())
    assert target["boxes"][0].tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    # Predictions are saved with the file's own ids.
    raw = json.loads((tmp_path / "tool.json").read_text())
    assert dataset.category_ids == [c["id"] for c in raw["categories"]][-2:]
    assert dataset.image_ids == [raw["images"][0]["id"]]
    # In another part, with the classes of the training set.
    again = coco_json.load_coco(
        str(tmp_path / "tool.json"), str(tmp_path / "images"), dataset.names
    )
    assert again.labels.tolist() == dataset.labels.tolist()


def test_a_placeholder_of_the_same_name_as_the_only_class(tmp_path):
    def one(name):
        raw = roboflow(name)
        raw["categories"] = [dict(id=0, name="cell", supercategory="none"),
                             dict(id=1, name="cell", supercategory="cell")]  # fmt: skip
        for annotation in raw["annotations"]:
            annotation["category_id"] = 1
        return raw

    path = write(tmp_path, one)
    for names in (None, ["cell"]):
        dataset = coco_json.load_coco(path, str(tmp_path / "images"), names)
        assert dataset.names == ["cell"] and dataset.labels.tolist() == [1, 1]


def test_ids_may_be_any_text(tmp_path):
    def mixed(name):
        raw = strings(name)
        raw["categories"] = [dict(id="22", name="cell"), dict(id="1a", name="nucleus")]
        for annotation, number in zip(raw["annotations"], ("1a", "22"), strict=True):
            annotation["category_id"] = number
        raw["images"] += [dict(raw["images"][0], id="07", file_name="other.png")]
        return raw

    dataset = coco_json.load_coco(write(tmp_path, mixed), str(tmp_path / "images"))
    assert dataset.names == ["cell", "nucleus"] and dataset.labels.tolist() == [2, 1]
    assert dataset.image_ids == ["7", "07"]


def test_a_category_that_is_used_is_never_dropped(tmp_path):
    def used(name):
        raw = roboflow(name)
        raw["annotations"][0]["category_id"] = 0
        return raw

    dataset = coco_json.load_coco(write(tmp_path, used), str(tmp_path / "images"))
    assert dataset.names == ["cells", "cell", "nucleus"]


def test_numbers_that_are_none_are_refused(tmp_path):
    def half(name):
        raw = labelme2coco(name)
        raw["images"][0]["width"] = 60.5
        return raw

    with pytest.raises(UserError, match="both must be whole numbers"):
        coco_json.load_coco(write(tmp_path, half), str(tmp_path / "images"))
