"""COCO, Cityscapes and VOC as their sites give them; published splits.

The folders are written here byte for byte in the sites' layouts and formats (16-bit PNGs
of instance ids, palette PNGs with a border of 255, XML), small, and converted by the
program itself. Claims: every mask, class and crowd is the one that was drawn; a command
killed at any moment goes on and ends with the same file; a list means the images that its
authors meant; and whatever is missing is one line.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, real, write_coco
from PIL import Image
from pycocotools import mask as mask_utils

from ssis import UserError, config
from ssis.datasets import coco_json, parts, published, split
from ssis.tools import prepare

CITIES = {"train": ("aachen", "bremen"), "val": ("frankfurt",)}


def write_cityscapes(root, images=2, size=(32, 64)):
    """Each image: two cars (26000, 26001), a group of persons, a road, one license plate."""
    ids = np.full(size, 7, np.uint16)
    ids[2:10, 4:20] = 26000
    ids[4:14, 14:30] = 26001
    ids[20:30, 40:60] = 24
    # A caravan is an instance, but of no class of the task.
    ids[20:28, 2:8] = 29000
    ids[0, 0] = 65535
    for part, cities in CITIES.items():
        for city in cities:
            photos, truth = (root / kind / part / city for kind in ("leftImg8bit", "gtFine"))
            photos.mkdir(parents=True)
            truth.mkdir(parents=True)
            for k in range(images):
                stem = f"{city}_{k:06d}_000019"
                pixels = np.random.RandomState(k).randint(0, 256, (*size, 3), np.uint8)
                Image.fromarray(pixels).save(photos / f"{stem}_leftImg8bit.png")
                Image.fromarray(ids).save(truth / f"{stem}_gtFine_instanceIds.png")
    return ids


def write_voc(root):
    """One image a part: a dog and a person, with a border of 255 between them."""
    base = root / "VOC2012"
    numbers = np.zeros((20, 30), np.uint8)
    numbers[2:10, 2:12] = 1
    numbers[2:18, 14:28] = 2
    numbers[2:18, 12:14] = 255
    palette = [value for k in range(256) for value in (k, 255 - k, k // 2)]
    for kind in ("JPEGImages", "SegmentationObject", "Annotations", "ImageSets/Segmentation"):
        (base / kind).mkdir(parents=True)
    for part, name in (("train", "2007_000032"), ("val", "2007_000033")):
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(base / f"JPEGImages/{name}.jpg")
        image = Image.fromarray(numbers, "P")
        image.putpalette(palette)
        image.save(base / f"SegmentationObject/{name}.png")
        box = "<bndbox><xmin>3</xmin><ymin>3</ymin><xmax>12</xmax><ymax>10</ymax></bndbox>"
        objects = "".join(
            f"<object><name>{kind}</name><difficult>0</difficult>{box}"
            "<part><name>head</name></part></object>"
            for kind in ("dog", "person")
        )
        (base / f"Annotations/{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename>{objects}</annotation>"
        )
        (base / f"ImageSets/Segmentation/{part}.txt").write_text(name + "\n")
    return numbers


@pytest.fixture(scope="module")
def cityscapes(tmp_path_factory):
    """A site's folder and the dataset that was made of it; tests that write make their own."""
    root = tmp_path_factory.mktemp("cityscapes")
    write_cityscapes(root)
    prepare.run(["cityscapes", "--root", str(root), "--out", str(root / "out"), "--workers", "1"])
    return root, root / "out"


def masks_of(path):
    """file name -> list of (class, crowd, mask) of a JSON."""
    raw = json.loads(path.read_text())
    names = {c["id"]: c["name"] for c in raw["categories"]}
    files = {image["id"]: image["file_name"] for image in raw["images"]}
    instances = {name: [] for name in files.values()}
    for a in raw["annotations"]:
        mask = mask_utils.decode(a["segmentation"]).astype(bool)
        assert a["area"] == mask.sum()
        instances[files[a["image_id"]]].append((names[a["category_id"]], a["iscrowd"], mask))
    return instances


def test_cityscapes_instances_and_groups(tmp_path, capsys):
    ids = write_cityscapes(tmp_path / "site")
    out = tmp_path / "out"
    arguments = ["cityscapes", "--root", str(tmp_path / "site"), "--out", str(out)]
    prepare.run([*arguments, "--workers", "2"])
    images = masks_of(out / "instances_train.json")
    assert sorted(images) == [
        f"{city}/{city}_{k:06d}_000019_leftImg8bit.png"
        for city in ("aachen", "bremen")
        for k in range(2)
    ]
    for instances in images.values():
        assert [(name, crowd) for name, crowd, _ in instances] == [
            ("person", 1),
            ("car", 0),
            ("car", 0),
        ]
        for (_, _, mask), value in zip(instances, (24, 26000, 26001), strict=True):
            assert (mask == (ids == value)).all()
    # Every image can be read through the link, and training reads all of it.
    dataset = coco_json.load_coco(str(out / "instances_val.json"), str(out / "val"))
    assert dataset.image(0).shape == (3, 32, 64) and len(dataset.names) == 8
    said = capsys.readouterr().out
    assert (
        "train: 4 images (the official part has 2975), 8 instances of 1 of 8 classes, 4 crowds"
        in said
    )
    # A second time there is nothing to do.
    before = (out / "instances_train.json").stat().st_mtime_ns
    prepare.run(arguments)
    assert (out / "instances_train.json").stat().st_mtime_ns == before


def test_voc_objects_have_the_classes_of_the_xml(tmp_path, capsys):
    numbers = write_voc(tmp_path / "VOCdevkit")
    out = tmp_path / "out"
    prepare.run(["voc", "--root", str(tmp_path / "VOCdevkit"), "--out", str(out)])
    ((dog, person),) = masks_of(out / "instances_train.json").values()
    assert dog[:2] == ("dog", 0) and (dog[2] == (numbers == 1)).all()
    assert person[:2] == ("person", 0) and (person[2] == (numbers == 2)).all()
    assert list(masks_of(out / "instances_val.json")) == ["2007_000033.jpg"]
    assert "the official part has 1464" in capsys.readouterr().out


def test_coco_is_linked_checked_and_split(tmp_path, capsys):
    mini = real("coco_mini")
    site = tmp_path / "site"
    (site / "annotations").mkdir(parents=True)
    for part in ("train", "val"):
        (site / f"{part}2017").symlink_to(mini / part)
        source = mini / f"instances_{part}.json"
        (site / "annotations" / f"instances_{part}2017.json").symlink_to(source)
    # Guided Distillation's form of a split: the JSON of the labeled images alone.
    raw = json.loads((mini / "instances_train.json").read_text())
    chosen = sorted(image["file_name"] for image in raw["images"][3:6])
    part = dict(raw, images=[i for i in raw["images"] if i["file_name"] in chosen])
    (tmp_path / "instances_train2017_1.json").write_text(json.dumps(part))
    out = tmp_path / "out"
    lists = str(tmp_path / "instances_train2017_1.json")
    prepare.run(["coco", "--root", str(site), "--out", str(out), "--lists", lists])
    assert "the official part has 118287" in capsys.readouterr().out
    dataset = coco_json.load_coco(str(out / "instances_train.json"), str(out / "train"))
    given = split.read_split(dataset, str(out / "splits" / "instances_train2017_1.json"))
    assert sorted(dataset.files[i] for i in given) == chosen
    # Our own: what `--labeled 10% --seed 2` draws.
    path = out / "splits" / "seed2-10pct.json"
    drawn, _ = split.draw_split(dataset, "10%", 2)
    assert split.read_split(dataset, str(path)) == drawn
    assert split.draw_split(dataset, str(path), 0)[0] == drawn
    assert json.loads(path.read_text())["seed"] == 2
    assert capsys.readouterr().err == ""


def test_killed_at_any_moment_it_goes_on_to_the_same_file(tmp_path):
    write_cityscapes(tmp_path / "site", images=40)
    whole = tmp_path / "whole"
    arguments = ["cityscapes", "--root", str(tmp_path / "site"), "--workers", "1", "--out"]
    prepare.run([*arguments, str(whole)])
    expected = (whole / "instances_train.json").read_bytes()
    out, kills = tmp_path / "out", 0
    command = [sys.executable, "-m", "ssis", "prepare", *arguments, str(out)]
    partial = out / ".instances_train.partial"

    def done() -> int:
        try:
            return partial.read_bytes().count(b"\n")
        except FileNotFoundError:  # not begun, or all done
            return 0

    for _ in range(3):
        process = subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        lines = done()
        # Until some more images are done; then all of its processes die at once. Twice, so
        # that it goes on from what it went on from.
        while process.poll() is None:
            if kills < 2 and done() > lines + 20:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
                break
            time.sleep(0.002)
        else:
            break
        # Nothing that looks finished, and a torn last line is no harm.
        assert not (out / "instances_val.json").exists()
        if partial.exists():
            with open(partial, "a") as file:
                file.write('{"file_name": "torn')
    assert process.returncode == 0 and kills >= 1
    assert (out / "instances_train.json").read_bytes() == expected
    assert not partial.exists() and not list(out.glob("*.tmp"))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda root: None,
            "no train images of cityscapes; it must hold files such as leftImg8bit",
        ),
        (
            lambda root: next(root.glob("gtFine/train/bremen/*")).unlink(),
            r"_gtFine_instanceIds.png: cannot be read \(No such file",
        ),
        (
            lambda root: next(root.glob("gtFine/train/*/*")).write_bytes(b"\x89PNG broken"),
            "instanceIds.png: cannot be read",
        ),
        (
            lambda root: Image.new("RGB", (8, 8)).save(next(root.glob("leftImg8bit/train/*/*"))),
            r"leftImg8bit.png: is \(8, 8\), its ground truth .* is \(32, 64\)",
        ),
    ],
    ids=["empty", "no truth", "broken", "size"],
)
def test_what_is_wrong_is_one_line(tmp_path, spoil, said):
    root = tmp_path / "site"
    root.mkdir()
    if said[:2] != "no":
        write_cityscapes(root)
    spoil(root)
    with pytest.raises(UserError, match=said) as error:
        prepare.run(["cityscapes", "--root", str(root), "--out", str(tmp_path / "out")])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "instances_train.json").exists()


def test_a_voc_object_without_a_class_is_one_line(tmp_path):
    write_voc(tmp_path)
    path = tmp_path / "VOC2012" / "Annotations" / "2007_000032.xml"
    path.write_text(path.read_text().replace("<name>person</name>", "<name>head</name>"))
    with pytest.raises(UserError, match=r"has an object 2, for which .*2007_000032.xml has no"):
        prepare.run(["voc", "--root", str(tmp_path), "--out", str(tmp_path / "out")])
    path.write_text("<annotation><object>")
    with pytest.raises(UserError, match=r"2007_000032.xml: cannot be read"):
        prepare.run(["voc", "--root", str(tmp_path), "--out", str(tmp_path / "out")])


def test_a_folder_of_images_is_never_replaced_by_a_link(tmp_path):
    write_cityscapes(tmp_path / "site")
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "mine.png").write_bytes(b"mine")
    with pytest.raises(UserError, match="is there and is no link; choose another --out"):
        prepare.run(
            ["cityscapes", "--root", str(tmp_path / "site"), "--out", str(tmp_path / "out")]
        )
    assert (tmp_path / "out" / "train" / "mine.png").read_bytes() == b"mine"


def test_a_link_is_replaced_in_one_step(tmp_path):
    """Also one to a folder: what is written is never put into that folder."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    path = tmp_path / "out" / "train"
    prepare.link(path, tmp_path / "old")
    prepare.link(path, tmp_path / "new")
    assert path.readlink() == tmp_path / "new"
    assert list(path.parent.iterdir()) == [path] and not list((tmp_path / "old").iterdir())
    with pytest.raises(UserError, match="not found; is --root the folder that holds it"):
        prepare.link(path, tmp_path / "nothing")
    assert path.readlink() == tmp_path / "new"


def test_ones_own_json_is_divided(tmp_path, capsys, coco_folder):
    arguments = ["own", "--json", str(coco_folder / "coco.json"), "--out", str(tmp_path / "o")]
    prepare.run([*arguments, "--root", str(coco_folder / "images"), "--val", "2"])
    whole = json.loads((coco_folder / "coco.json").read_text())
    parts = [
        coco_json.load_coco(
            str(tmp_path / "o" / f"instances_{part}.json"), str(tmp_path / "o" / part)
        )
        for part in ("train", "val")
    ]
    names = [name for part in parts for name in part.files]
    assert sorted(names) == sorted(image["file_name"] for image in whole["images"])
    assert len(parts[0]) == len(parts[1]) == 2
    # Both classes that are annotated can be learned, and nothing is lost.
    assert set().union(*(parts[0].present_labels(i) for i in range(2))) == {1, 2}
    assert sum(len(part.labels) for part in parts) == len(whole["annotations"])
    assert parts[0].names == parts[1].names
    said = capsys.readouterr().out
    assert "ready: python train.py --preset photos --data " in said
    assert "or --preset custom --data " in said and "no image to judge" not in said
    for share, said in [
        ("100%", "leaves no image to train on"),
        ("no", "--val no: must be a share"),
    ]:
        with pytest.raises(UserError, match=said):
            prepare.run([*arguments, "--root", str(coco_folder / "images"), "--val", share])
    with pytest.raises(UserError, match="own needs --json"):
        prepare.run(["own", "--root", str(coco_folder)])


# ---------------------------------------------------------------------- published lists


def dataset_of(tmp_path, count=60):
    """Images with ids in another order than their names; every third has a crowd alone,
    every fifth nothing."""
    images, annotations = [], []
    for k in range(count):
        images.append(dict(id=1000 - 7 * k, file_name=f"{k:06d}.png", height=8, width=8))
        if k % 5:
            polygon = dict(segmentation=[[1, 1, 6, 1, 6, 6, 1, 6]], iscrowd=0)
            crowd = dict(segmentation=dict(size=[8, 8], counts=[9, 6, 49]), iscrowd=1)
            annotations.append(
                dict(id=k + 1, image_id=1000 - 7 * k, category_id=1) | (polygon if k % 3 else crowd)
            )
    raw = dict(images=images, annotations=annotations, categories=[dict(id=1, name="cell")])
    (tmp_path / "train.json").write_text(json.dumps(raw))
    return coco_json.load_coco(str(tmp_path / "train.json"), str(tmp_path))


def test_unbiased_teachers_positions_are_among_the_images_with_instances(tmp_path):
    dataset = dataset_of(tmp_path)
    # By hand: those with an annotation that is no crowd, by their ids.
    raw = json.loads((tmp_path / "train.json").read_text())
    name = {image["id"]: image["file_name"] for image in raw["images"]}
    usable = sorted({a["image_id"] for a in raw["annotations"] if not a["iscrowd"]})
    count = int(10.0 / 100.0 * len(usable))
    folds = {"0": list(range(count)), "1": [len(usable) - 1 - k for k in range(count)]}
    path = tmp_path / "COCO_supervision.txt"
    # 0.01 % of so few is no image: no split.
    path.write_text(json.dumps({"0.01": {"0": [], "1": []}, "10.0": folds}))
    splits = published.read(str(path), dataset)
    assert set(splits) == {"COCO_supervision-10pct-fold0", "COCO_supervision-10pct-fold1"}
    for fold, positions in folds.items():
        names = {dataset.files[i] for i in splits[f"COCO_supervision-10pct-fold{fold}"]}
        assert names == {name[usable[position]] for position in positions}
    # That of the real COCO is not taken for this one's.
    path.write_text(json.dumps({"1.0": {"1": list(range(1172))}}))
    with pytest.raises(UserError, match="has 1172 positions, of 32 images with instances"):
        published.read(str(path), dataset)


@pytest.mark.parametrize(
    "line",
    [
        "{}_gtFine_instanceIds.png",
        "{}_leftImg8bit.png",
        "train/aachen/{}_leftImg8bit",
        "{}",
    ],
)
def test_lists_of_names(tmp_path, cityscapes, line):
    root, out = cityscapes
    names = ["bremen_000001_000019", "aachen_000000_000019"]
    path = tmp_path / "perc_50.txt"
    path.write_text("".join(line.format(n) + "\n" for n in names))
    # Converted already: only the list is new.
    prepare.run(["cityscapes", "--root", str(root), "--out", str(out), "--lists", str(path)])
    given = json.loads((out / "splits" / "perc_50.json").read_text())
    assert given["labeled"] == [
        "aachen/aachen_000000_000019_leftImg8bit.png",
        "bremen/bremen_000001_000019_leftImg8bit.png",
    ]
    assert given["published"] == "perc_50.txt" and given["seed"] is None and given["of"] == 4


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("000001\n999999\n", r"1 names, the first '999999', of 2 that .*train.json does not"),
        ("", "none of 0 that"),
        ("[1, 2", "does not"),
        ("[1, 2]", "not a list of labeled images"),
        ('{"5.0": [1, 2]}', "'5.0' is not a percentage with folds"),
        ('{"five": {"1": [1]}}', "'five' is not a percentage"),
        ('{"5.0": {"1": ["a"]}}', "is not a percentage with folds of positions"),
        (b"\xff\xfe\x00", "cannot be read .not text"),
        (None, "cannot be read .No such file"),
    ],
)
def test_a_list_of_something_else_is_one_line(tmp_path, content, said):
    dataset, path = dataset_of(tmp_path), tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said) as error:
        published.read(str(path), dataset)
    assert re.match(r"--lists \S*list.txt: ", str(error.value))


def test_a_split_of_other_images_is_warned_of(tmp_path, capsys):
    dataset = dataset_of(tmp_path)
    chosen, _ = split.draw_split(dataset, "10%", 0)
    split.write_split(dataset, chosen, tmp_path / "labeled.json", 0)
    assert split.read_split(dataset, str(tmp_path / "labeled.json")) == chosen
    assert capsys.readouterr().err == ""
    (tmp_path / "other").mkdir()
    larger = dataset_of(tmp_path / "other", count=61)
    assert split.read_split(larger, str(tmp_path / "labeled.json")) == chosen
    said = capsys.readouterr().err
    assert "was drawn from other images" in said and "(60, not 61; the checksums differ)" in said


def test_validation_images_in_the_folder_of_photos_are_not_trained_on(tmp_path, coco_folder):
    """Annotated and other photos lie in one folder, as a person's do."""
    photos = coco_folder / "images"
    Image.new("L", (50, 40)).save(photos / "new.png")
    out = tmp_path / "o"
    prepare.run(own(coco_folder, out))
    settings = config.parse(["--preset", "custom", "--method", "pl-dc", "--data", str(out)])
    settings.unlabeled_images = str(photos)
    train_set, val, _ = parts.open_parts(settings)
    assert not set(train_set.files) & set(val.files)
    assert sorted([*train_set.files, *val.files]) == ["0.png", "1.png", "2.png", "3.png", "new.png"]
    assert train_set.annotated == 2 and len(train_set) == 3


def test_copies_of_validation_images_are_known(tmp_path, coco_folder):
    """An export brings copies of the photos, under other names."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for k in range(4):
        content = (coco_folder / "images" / f"{k}.png").read_bytes()
        (photos / f"IMG_{k}.png").write_bytes(content)
    # Neither a link to nothing nor a folder with a picture's name is a reason to stop.
    (photos / "broken.png").symlink_to(tmp_path / "nothing.png")
    (photos / "folder.png").mkdir()
    # Another picture that happens to be of the same size in bytes.
    (photos / "other.png").write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    dataset = coco_json.load_coco(str(coco_folder / "coco.json"), str(coco_folder / "images"))
    added = [dataset.files[i] for i in coco_json.add_folder(dataset, str(photos))]
    assert added == ["broken.png", "other.png"]
    # The first is told by its name when the files are looked at.
    with pytest.raises(UserError, match=r"broken.png: image not found"):
        dataset.check_files()


def own(folder, out, val="2") -> list[str]:
    return [
        "own", "--json", str(folder / "coco.json"), "--root", str(folder / "images"),
        "--out", str(out), "--val", val,
    ]  # fmt: skip


def files_of(out, part) -> set[str]:
    raw = json.loads((out / f"instances_{part}.json").read_text())
    return {image["file_name"] for image in raw["images"]}


def test_a_second_round_keeps_the_images_that_are_judged_by(tmp_path):
    first = dataset_of(tmp_path, 30)
    for k in range(40):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{k:06d}.png")
    (tmp_path / "images").symlink_to(tmp_path)
    (tmp_path / "train.json").rename(tmp_path / "coco.json")
    out = tmp_path / "out"
    prepare.run(own(tmp_path, out, "6"))
    val = files_of(out, "val")
    assert len(val) == 6 and not val & files_of(out, "train")
    # Ten more are annotated, before and after the others.
    dataset_of(tmp_path, 40)
    (tmp_path / "train.json").rename(tmp_path / "coco.json")
    prepare.run(own(tmp_path, out, "6"))
    assert files_of(out, "val") == val
    prepare.run(own(tmp_path, out, "8"))
    assert files_of(out, "val") > val and len(files_of(out, "val")) == 8
    assert len(files_of(out, "train")) == 32 and len(first) == 30


def test_the_only_image_of_a_class_is_trained_on(tmp_path, capsys):
    raw = write_coco(tmp_path)
    for annotation in raw["annotations"]:
        annotation.update(category_id=7 if annotation["id"] > 1 else 0, iscrowd=0)
    (tmp_path / "coco.json").write_text(json.dumps(raw))
    prepare.run(own(tmp_path, tmp_path / "o"))
    assert "0.png" in files_of(tmp_path / "o", "train")
    # A class that nobody annotated: said, not fatal.
    assert "cannot be learned: unused" in capsys.readouterr().err


def test_what_is_not_its_own_is_never_written_over(tmp_path, coco_folder, cityscapes):
    """The user's JSON and folders; and another dataset's, converted before."""
    mine = tmp_path / "mine"
    mine.mkdir()
    source = (coco_folder / "coco.json").read_bytes()
    for name in ("instances_train.json", "instances_val.json"):
        (mine / name).write_bytes(source)
    arguments = own(coco_folder, mine)
    with pytest.raises(UserError, match="was not made by prepare own; choose another --out"):
        prepare.run(arguments)
    arguments[2] = str(mine / "instances_train.json")
    with pytest.raises(UserError, match="was not made by prepare own"):
        prepare.run(arguments)
    assert (mine / "instances_train.json").read_bytes() == source
    root, converted = cityscapes
    with pytest.raises(UserError, match="was not made by prepare cityscapes"):
        prepare.run(["cityscapes", "--root", str(root), "--out", str(mine)])
    with pytest.raises(UserError, match="was not made by prepare own"):
        prepare.run(own(coco_folder, converted))


def test_the_ground_truth_matters_and_the_spelling_of_the_root_not(tmp_path, monkeypatch, capsys):
    write_cityscapes(tmp_path / "site")
    out = str(tmp_path / "out")
    prepare.run(["cityscapes", "--root", str(tmp_path / "site"), "--out", out])
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    prepare.run(["cityscapes", "--root", "site", "--out", out])
    assert capsys.readouterr().out.count("is there already") == 2
    path = next((tmp_path / "site").glob("gtFine/train/*/*"))
    Image.fromarray(np.full((32, 64), 24001, np.uint16)).save(path)
    prepare.run(["cityscapes", "--root", "site", "--out", out])
    assert capsys.readouterr().out.count("is there already") == 1
    images = masks_of(tmp_path / "out/instances_train.json")
    assert any(len(instances) == 1 for instances in images.values())


KILLS_ITSELF = """
import os, signal, sys
from pathlib import Path
from ssis import UserError
from ssis.datasets import convert

def killed(job):
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    try:
        convert.convert_part("cityscapes", Path(sys.argv[1]), Path(sys.argv[2]), "train", 1)
    except UserError as error:
        print(error)
else:  # the process that converts
    convert.SOURCES["cityscapes"] = convert.SOURCES["cityscapes"]._replace(annotations=killed)
"""


def test_a_process_that_is_killed_does_not_hang_the_command(tmp_path):
    write_cityscapes(tmp_path / "site")
    (tmp_path / "kills.py").write_text(KILLS_ITSELF)
    done = subprocess.run(
        [sys.executable, tmp_path / "kills.py", tmp_path / "site", tmp_path / "out"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "was killed, perhaps because memory ran out; give fewer --workers" in done.stdout, (
        done.stderr
    )
