"""What several tests share: small datasets in COCO format, and the real images.

Which tests belong to which graded task is said in docs/assignments/tasks.toml alone; here
they get the markers `task1_1`, ... that it makes.

The real images are a folder beside the project, `../shared/data` (or the environment
variable SSIS_TEST_DATA); tests that read it are skipped, by name, where it is absent.
"""

import json
import os
import sys
from pathlib import Path

# Before torch is loaded, and for every program that a test starts: models this small are
# faster with one thread than with two that wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
REAL = Path(os.environ.get("SSIS_TEST_DATA", ROOT.parent / "shared" / "data"))


def real(name: str) -> Path:
    """A folder of real images, or a skipped test."""
    folder = REAL / name
    if not folder.is_dir():
        pytest.skip(f"no real images: {folder} is absent")
    return folder


TASKS = tomllib.loads((ROOT / "docs" / "assignments" / "tasks.toml").read_text("utf-8"))["task"]


def pytest_configure(config):
    for task in TASKS:
        line = f"task{task['id']}: {task['title']} ({task['module']}, {task['function']})"
        config.addinivalue_line("markers", line)


# First: before pytest picks the tests that -m asks for.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    markers: dict = {}
    for task in TASKS:
        for test in task["tests"]:
            markers.setdefault(test, []).append(f"task{task['id']}")
    for item in items:
        for marker in markers.get(item.nodeid.split("[")[0], ()):
            item.add_marker(marker)


@pytest.fixture(autouse=True)
def _seeded():
    """The same random numbers in every run; others where SSIS_SEED says so."""
    torch.manual_seed(int(os.environ.get("SSIS_SEED", "0")))


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory) -> Path:
    """A small shapes dataset: 40 training, 6 validation and 6 test images."""
    from ssis.datasets import shapes

    folder = tmp_path_factory.mktemp("shapes")
    shapes.make(folder, parts=dict(train=40, val=6, test=6))
    return folder


def made_labels(labels, class_quality, mask_quality, distribution=None, features=(1, 7, 7)):
    """Pseudo-labels of 20 x 20 pixels with given qualities; three classes."""
    from ssis.teacher import PseudoLabels

    n = len(labels)
    masks = torch.zeros(n, 20, 20, dtype=torch.bool)
    masks[:, 4:12, 4:16] = True
    boxes = torch.tensor([[4.0, 4.0, 16.0, 12.0]]).repeat(n, 1)
    if distribution is None:
        distribution = torch.full((n, 3), 0.01)
    return PseudoLabels(
        boxes, torch.tensor(labels, dtype=torch.int64), torch.tensor(class_quality),
        torch.tensor(mask_quality),
        masks.float(), masks, torch.as_tensor(distribution), torch.rand(n, *features),
        torch.zeros(n, 1, 28, 28), boxes,
    )  # fmt: skip


def write_coco(folder: Path, change=None) -> dict:
    """A COCO dataset of 4 images with every kind of annotation; returns its JSON.

    Category ids have a gap and start at 0; image 3 has no annotation; image 1 has a
    polygon in two parts, image 2 a crowd as uncompressed RLE and a compressed RLE.

    Args:
        folder: gets `images/` and `coco.json`.
        change: a function that spoils the JSON before it is written.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.RandomState(0)
    images = []
    for k in range(4):
        pixels = rng.randint(0, 256, (32, 48, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{k}.png")
        images.append(dict(id=10 * k, file_name=f"{k}.png", height=32, width=48))
    column = [5 * 32 + 4, 8, 24, 8, 32 * 48 - 5 * 32 - 44]
    annotations = [
        dict(
            id=1,
            image_id=0,
            category_id=0,
            iscrowd=0,
            area=-1,
            bbox=[0, 0, 0, 0],
            segmentation=[[4, 4, 20, 4, 20, 12, 4, 12]],
        ),
        dict(
            id=2,
            image_id=0,
            category_id=7,
            iscrowd=0,
            segmentation=[[30, 20, 40, 20, 40, 28], [2, 20, 8, 20, 8, 30, 2, 30]],
        ),
        dict(
            id=3,
            image_id=10,
            category_id=7,
            iscrowd=0,
            segmentation=[[1, 1, 12.5, 1, 12.5, 9.25, 1, 9]],
        ),
        dict(
            id=4,
            image_id=20,
            category_id=0,
            iscrowd=1,
            segmentation=dict(size=[32, 48], counts=column),
        ),
        dict(
            id=5,
            image_id=20,
            category_id=0,
            iscrowd=0,
            segmentation=dict(size=[32, 48], counts=[40, 10, 22, 10, 1454]),
        ),
    ]
    raw = dict(
        images=images,
        annotations=annotations,
        categories=[dict(id=7, name="dog"), dict(id=0, name="cat"), dict(id=9, name="unused")],
    )
    if change:
        raw = change(raw) or raw
    (folder / "coco.json").write_text(json.dumps(raw))
    return raw


@pytest.fixture
def coco_folder(tmp_path) -> Path:
    write_coco(tmp_path)
    return tmp_path


@pytest.fixture
def few(monkeypatch):
    """Six detections an image: a teacher of four steps finds a hundred, SAM redraws all."""
    from ssis import networks

    build = networks.build

    def build_with_few(*arguments, **more):
        net = build(*arguments, **more)
        net.roi_heads.detections_per_img = 6
        return net

    monkeypatch.setattr(networks, "build", build_with_few)
