"""Your own data, as it really arrives: copies, odd names, odd masks, boxes alone.

Each file is written here as its tool writes it. Claims: copies of one picture never lie on both
sides of training and judging; what a tool means is read; and what cannot be meant is one line.
"""

import json
import sys

import numpy as np
import pytest
from conftest import ROOT, real
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from pycocotools import mask as mask_utils
from segment_anything import SamPredictor
from test_annotation_tools import POLYGONS, label_studio, labelme2coco, roboflow

from ssis import UserError, config, sam
from ssis.datasets import coco_json, copies, file_names, split
from ssis.datasets.parts import open_parts
from ssis.io.images import read_image
from ssis.tools import masks_from_boxes, prepare

pytestmark = pytest.mark.fast


def picture(seed: int, side: int = 64) -> Image.Image:
    """A scene of soft blobs: like photographs, it is mostly of low frequencies."""
    noise = np.random.RandomState(seed).randint(0, 256, (side // 8, side // 8, 3), np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


def export(folder, files: dict[str, Image.Image]) -> None:
    """A COCO JSON of these images, each with one square of one class."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for k, (name, image) in enumerate(files.items()):
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        images.append(dict(id=k, file_name=name, width=image.width, height=image.height))
        annotations.append(dict(id=k, image_id=k, category_id=1, iscrowd=0, bbox=[4, 4, 20, 20],
                                segmentation=[[4, 4, 24, 4, 24, 24, 4, 24]]))  # fmt: skip
    raw = dict(images=images, annotations=annotations, categories=[dict(id=1, name="cell")])
    (folder / "coco.json").write_text(json.dumps(raw))


def own(folder, *flags) -> dict[str, list[str]]:
    """`prepare own`; the file names of both parts."""
    out = folder / "out"
    prepare.run([
        "own", "--json", str(folder / "coco.json"), "--root", str(folder / "images"),
        "--out", str(out), *flags,
    ])  # fmt: skip
    return {
        part: [
            image["file_name"]
            for image in json.loads((out / f"instances_{part}.json").read_text())["images"]
        ]
        for part in ("train", "val")
    }


# --------------------------------------------------------------------------- copies


def test_versions_by_roboflow_stay_on_one_side(tmp_path, capsys):
    """Three versions of ten photos; that they are versions is in the names alone."""
    names = [f"photo{n}_jpg.rf.{97 * n + k:032x}.jpg" for n in range(10) for k in range(3)]
    export(tmp_path, {name: picture(k) for k, name in enumerate(names)})
    parts = own(tmp_path, "--val", "10")
    origins = {part: {name.split("_jpg")[0] for name in parts[part]} for part in parts}
    assert not origins["train"] & origins["val"]
    # Whole groups of three: nine of the ten that were wanted.
    assert len(parts["val"]) == 9 and len(parts["train"]) == 21
    assert "10 groups of 30 images (versions of one picture or" in capsys.readouterr().out


def test_a_second_export_has_other_hashes(tmp_path, capsys):
    """Judged by before, a photo is judged by again, whatever its new versions are called."""

    def names(mark):
        return [f"photo{n}_jpg.rf.{mark}{k}.jpg" for n in range(10) for k in range(2)]

    export(tmp_path, {name: picture(k) for k, name in enumerate(names("a"))})
    first = own(tmp_path, "--val", "6")["val"]
    (tmp_path / "images").rename(tmp_path / "before")
    export(tmp_path, {name: picture(40 + k) for k, name in enumerate(names("b")[2:])})
    again = own(tmp_path, "--val", "6")["val"]
    assert len(again) == 6
    kept = {name.split("_")[0] for name in first} - {"photo0"}
    assert kept <= {name.split("_")[0] for name in again}
    assert ("photo0" in str(first)) == ("no longer in" in capsys.readouterr().err)


@pytest.mark.parametrize(
    ("names", "group"),
    [
        (["train/clip_mp4-12_jpg.rf.0a.jpg", "valid/clip_mp4-13_jpg.rf.0b.jpg"], "clip"),
        (["photo_jpg.rf.aa_jpg.rf.bb.jpg", "photo_jpg.rf.cc_jpg.rf.dd.jpg"], "photo"),
        (["IMG_7_HEIC.rf.ab.jpg", "IMG_7_avif.rf.cd.jpg", "IMG_7.png"], "IMG_7"),
        (["frame_0001.png", "frame-2.jpg"], "frames"),
        (["a/clip.frame 3.png", "a/clip.frame 4.png"], "a/clip"),
    ],
)
def test_names_of_one_group(names, group):
    assert {copies.group_of(name) for name in names} == {group}


def test_names_that_only_look_like_frames():
    names = ["timeframe2.jpg", "xavi1.png", "a/0001.jpg", "b/0001.jpg", "DSC_0012.jpg"]
    assert {copies.group_of(name) for name in names} == {n.rsplit(".", 1)[0] for n in names}


def test_frames_of_a_film_stay_on_one_side(tmp_path):
    names = [f"{film}_frame_{k:04d}.png" for film in "abcdef" for k in range(4)]
    names += [f"{film}_mp4-{k}_jpg.rf.{k:032x}.jpg" for film in "gh" for k in range(4)]
    export(tmp_path, {name: picture(k) for k, name in enumerate(names)})
    parts = own(tmp_path, "--val", "25%")
    films = {part: {name[0] for name in parts[part]} for part in parts}
    assert not films["train"] & films["val"] and len(films["val"]) == 2


CHANGES = {
    "smaller": lambda image: image.resize((40, 40)),
    "mirrored": ImageOps.mirror,
    "turned": lambda image: image.transpose(Image.Transpose.ROTATE_270),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
    "gray": lambda image: image.convert("L"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_copies_without_telling_names_are_seen(tmp_path, change):
    files = {}
    for k in range(12):
        files[f"{k}.png"] = picture(k)
        files[f"DSC_{100 + k}.jpg"] = CHANGES[change](picture(k))
    export(tmp_path, files)
    parts = own(tmp_path, "--val", "6")
    assert len(parts["val"]) == 6
    for k in range(12):
        assert (f"{k}.png" in parts["val"]) == (f"DSC_{100 + k}.jpg" in parts["val"])


def test_copies_of_16_bits_are_seen(tmp_path):
    """Microscopes write them; to Pillow nearly all of their values are white."""
    for k in range(2):
        dark = np.asarray(picture(k).convert("L"), np.uint16) * 40 + 600
        Image.fromarray(dark).save(tmp_path / f"{k}.png")
        Image.fromarray(np.ascontiguousarray(dark[:, ::-1])).save(tmp_path / f"{k}-copy.png")
    paths = [str(tmp_path / f"{k}.png") for k in range(2)]
    others = [str(tmp_path / f"{k}-copy.png") for k in range(2)]
    assert copies.alike(paths, others) == [(0, 0), (1, 1)]


def test_images_of_one_color_are_no_copies(tmp_path):
    export(tmp_path, {f"{k}.png": Image.new("L", (64, 64), k) for k in range(8)})
    assert len(own(tmp_path, "--val", "2")["val"]) == 2


@pytest.mark.parametrize("folder", ["nuclei/train", "wbc/images", "animals/images"])
def test_real_images_that_are_alike_are_not_taken_for_copies(folder):
    """Nuclei look like nuclei. Blood cells: the copies that this dataset really has."""
    # The first 100 photographs and nuclei: hashing is some 10 ms each.
    paths = sorted(str(path) for path in real(folder).iterdir())
    paths = paths if "wbc" in folder else paths[:100]
    pairs = {tuple(sorted(pair)) for pair in copies.alike(paths, paths) if pair[0] != pair[1]}
    found = {tuple(paths[k].rsplit("/", 1)[1] for k in pair) for pair in pairs}
    expected = {("112.png", "139.png"), ("157.png", "158.png"), ("166.png", "171.png"),
             ("167.png", "169.png")}  # fmt: skip
    assert found == (expected if "wbc" in folder else set())


def test_a_group_that_is_nearly_everything_is_refused(tmp_path):
    export(tmp_path, {f"frame_{k:06d}.png": picture(k) for k in range(20)})
    with pytest.raises(UserError, match=r"20 of 20 images are taken for .*--group-by") as error:
        own(tmp_path)
    assert "\n" not in str(error.value)
    # Ten frames each: one of the two groups is to judge by.
    parts = own(tmp_path, "--val", "10", "--group-by", r"(.*)\d$")
    tens = {part: {name[:-5] for name in parts[part]} for part in parts}
    assert len(tens["train"]) == len(tens["val"]) == 1 and tens["train"] != tens["val"]


def test_each_image_for_itself(tmp_path):
    export(tmp_path, {f"frame_{k:06d}.png": picture(k) for k in range(20)})
    assert len(own(tmp_path, "--val", "3", "--group-by", "(.*)")["val"]) == 3
    with pytest.raises(UserError, match=r"--group-by \(: not an expression"):
        own(tmp_path, "--group-by", "(")
    with pytest.raises(UserError, match=r"finds nothing in any of the 20 names, such as 'frame_0"):
        own(tmp_path, "--group-by", "film")


def test_without_imagehash_names_are_compared_and_it_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "imagehash", None)
    names = [f"a{n}_png.rf.{k}.png" for n in range(5) for k in range(2)]
    export(tmp_path, {name: picture(k) for k, name in enumerate(names)})
    parts = own(tmp_path, "--val", "4")
    assert not {n[:2] for n in parts["train"]} & {n[:2] for n in parts["val"]}
    assert "pip install imagehash" in capsys.readouterr().err


def test_unlabeled_images_are_compared_with_those_to_be_judged_by(tmp_path):
    """A version by its name, one compressed anew by its looks, and one that is none."""
    export(tmp_path, {"a_jpg.rf.1f.jpg": picture(1), "b.png": picture(2)})
    photos = tmp_path / "photos"
    photos.mkdir()
    # The original of a version, cropped, so that its name alone tells.
    picture(1).crop((0, 0, 40, 40)).save(photos / "a.jpg")
    picture(2).resize((50, 50)).save(photos / "other.jpg", quality=50)
    picture(3).save(photos / "new.png")
    # A version of a plain image that is judged by, turned, so that its name alone tells.
    picture(2).rotate(20).save(photos / "b_png.rf.00.jpg")
    # Another photo that happens to have the name of one that is judged by.
    picture(5).save(photos / "b.png")
    dataset = coco_json.load_coco(str(tmp_path / "coco.json"), str(tmp_path / "images"))
    # The original of a version that is labeled, too.
    picture(7).crop((0, 0, 30, 30)).save(photos / "d.jpg")
    export(tmp_path / "train", {"c.png": picture(4), "d_jpg.rf.2e.jpg": picture(7)})
    train_set = coco_json.load_coco(
        str(tmp_path / "train/coco.json"), str(tmp_path / "train/images")
    )
    added = coco_json.add_folder(train_set, str(photos), apart=(dataset,))
    assert [train_set.files[i] for i in added] == ["b.png", "new.png"]
    said = "\n".join(train_set.warnings)
    assert "3 images are versions or copies of validation or" in said
    assert "1 images are versions of images in" in said and "d.jpg is the first" in said


def rimmed(seed: int) -> Image.Image:
    """A disc on black, as of an endoscope: the first and last rows are all black."""
    image = Image.new("RGB", (96, 96))
    image.paste(picture(seed, 32), (32, 32))
    return image


@pytest.mark.parametrize("kind", ["bmp", "tif", "png"])
def test_a_black_rim_makes_no_copies(tmp_path, kind):
    """Uncompressed, these files have one size, and their first and last 4 kB are the same."""
    export(tmp_path, {f"{k}.{kind}": rimmed(k) for k in range(2)})
    known = copies.Known([str(tmp_path / "images" / f"{k}.{kind}") for k in range(2)])
    photos = tmp_path / "photos"
    photos.mkdir()
    for k in range(6):
        rimmed(k).save(photos / f"new{k}.{kind}")
    assert [str(photos / f"new{k}.{kind}") in known for k in range(6)] == [True] * 2 + [False] * 4


def test_photos_of_one_scene_can_be_told_apart_by_name(tmp_path, capsys):
    """A fixed camera: all that is new in a picture is small, and looks take it for a copy."""
    scene = picture(1, 128)

    def photo(k):
        image = scene.copy()
        image.paste((250, 20, 20), (4 * k + 8, 60, 4 * k + 14, 66))
        return image

    export(tmp_path, {f"photo{k}.png": photo(k) for k in range(8)})
    photos = tmp_path / "photos"
    photos.mkdir()
    for k in range(8, 20):
        photo(k).save(photos / f"new{k}.png")
    with pytest.raises(UserError, match=r'8 of 8 images are taken for .*: --group-by "\(\.\*\)"'):
        own(tmp_path, "--val", "2")
    own(tmp_path, "--val", "2", "--group-by", "(.*)")
    assert "names differ" not in capsys.readouterr().out
    out, images = tmp_path / "out", str(tmp_path / "images")
    judged = coco_json.load_coco(str(out / "instances_val.json"), images)
    train_set = coco_json.load_coco(str(out / "instances_train.json"), images)
    assert len(coco_json.add_folder(train_set, str(photos), apart=(judged,))) == 12
    # Without that expression they are left out, with the way to have them.
    judged.group_by = ""
    train_set = coco_json.load_coco(str(out / "instances_train.json"), images)
    with pytest.raises(
        UserError, match=r"no new image.*prepare the annotated ones with --group-by"
    ):
        coco_json.add_folder(train_set, str(photos), apart=(judged,))


def test_numbered_names_may_be_frames(tmp_path, capsys):
    """As ffmpeg writes them; but cameras number photos, too, so nothing is grouped."""
    export(tmp_path, {f"out-{k:03d}.png": picture(k) for k in range(60)})
    assert len(own(tmp_path, "--val", "10")["val"]) == 10
    said = capsys.readouterr().out
    assert "60 of 60 names differ in a number alone, such as out-000.png" in said
    assert r'--group-by "(.*)\d$" (each 10 frames)' in said
    parts = own(tmp_path, "--group-by", r"(.*)\d$", "--val", "10")
    assert len({name[:-5] for name in parts["val"]} & {name[:-5] for name in parts["train"]}) == 0


def test_groups_that_do_not_fit_say_how_many_would(tmp_path):
    names = [f"photo{n}_jpg.rf.{97 * n + k:032x}.jpg" for n in range(4) for k in range(3)]
    export(tmp_path, {name: picture(k) for k, name in enumerate(names)})
    with pytest.raises(UserError, match=r"the smallest group has 3 images; give --val 3, or"):
        own(tmp_path)
    assert len(own(tmp_path, "--val", "3")["val"]) == 3


def already_split(folder) -> list[str]:
    """Flags of train.py for an export in two parts."""
    flags = ["--preset", "custom", "--method", "supervised"]
    for part, name in (("train", "train"), ("val", "valid")):
        flags += [f"--{part}-json", str(folder / name / "coco.json")]
        flags += [f"--{part}-images", str(folder / name / "images")]
    return flags


def test_an_export_that_was_split_after_it_was_augmented(tmp_path):
    """Roboflow's parts as they are: a version of each photo in both is told."""
    for part, mark in (("train", "a"), ("valid", "b")):
        names = [f"photo{n}_jpg.rf.{mark}{n}.jpg" for n in range(3)]
        export(tmp_path / part, {name: picture(k) for k, name in enumerate(names)})
    flags = already_split(tmp_path)
    train_set, _, _ = open_parts(config.parse(flags))
    (said,) = train_set.warnings
    assert "3 images are versions of images in" in said and "prepare own divide them" in said


def test_images_that_are_in_two_parts_are_told(tmp_path):
    """Whatever their names: a validation image that is trained on judges nothing."""
    export(tmp_path / "train", {f"{k}.png": picture(k) for k in range(4)})
    export(tmp_path / "valid", {"other.png": picture(2), "new.png": picture(9)})
    flags = already_split(tmp_path)
    train_set, _, _ = open_parts(config.parse(flags))
    (said,) = train_set.warnings
    assert "1 images are in" in said and "2.png is the first" in said
    same = [flag.replace("valid", "train") for flag in flags]
    assert "4 images are in" in open_parts(config.parse(same))[0].warnings[0]


def test_versions_are_labeled_together(tmp_path):
    """Half of thirty versions of ten photos: five photos, not some of each."""
    names = [f"train/photo{n}_jpg.rf.{k}{n}a.jpg" for n in range(10) for k in range(3)]
    export(tmp_path, {name: picture(k) for k, name in enumerate(names)})
    dataset = coco_json.load_coco(str(tmp_path / "coco.json"), str(tmp_path / "images"))
    for labeled, count in (("50%", 15), ("4", 6)):
        chosen, _ = split.draw_split(dataset, labeled, 0)
        assert len(chosen) == count
        assert len({names[i].split("_")[0] for i in chosen}) == count // 3


def test_what_the_validation_part_lacks_is_said(tmp_path, capsys):
    export(tmp_path, {f"{k}.png": picture(k) for k in range(8)})
    raw = json.loads((tmp_path / "coco.json").read_text())
    raw["categories"].append(dict(id=2, name="rare"))
    for k in (0, 1):
        raw["annotations"][k]["category_id"] = 2
    (tmp_path / "coco.json").write_text(json.dumps(raw))
    own(tmp_path, "--val", "1")
    said = capsys.readouterr()
    assert "val: 1 images, 1 instances of 1 of 2 classes" in said.out
    assert "no image to judge rare by; give more to --val" in said.err
    # More stay than are asked for later; and none of them left is no second round.
    own(tmp_path, "--val", "4")
    own(tmp_path, "--val", "1")
    assert "--val 1: the 4 images that an earlier call chose stay" in capsys.readouterr().out
    for image in raw["images"]:
        image["file_name"] = "new" + image["file_name"]
    for path in (tmp_path / "images").glob("*.png"):
        path.rename(path.with_name("new" + path.name))
    (tmp_path / "coco.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"has none of the images in .*give another --out"):
        own(tmp_path)


def test_what_was_corrected_later_joins_the_first_export(tmp_path):
    """Both count from 1, and number the classes in their own ways; one class is new."""
    export(tmp_path, {f"{k}.png": picture(k) for k in range(6)})
    before = own(tmp_path, "--val", "2")
    export(tmp_path / "more", {f"new{k}.png": picture(9 + k) for k in range(3)})
    raw = json.loads((tmp_path / "more" / "coco.json").read_text())
    raw["categories"] = [dict(id=1, name="rare"), dict(id=2, name="cell")]
    for record, label in zip(raw["annotations"], (2, 1, 2), strict=True):
        record["category_id"] = label
    later = tmp_path / "more" / "coco.json"
    later.write_text(json.dumps(raw))
    for path in (tmp_path / "more" / "images").iterdir():
        path.rename(tmp_path / "images" / path.name)
    parts = own(tmp_path, "--val", "2", "--json", str(tmp_path / "coco.json"), str(later))
    assert parts["val"] == before["val"]
    assert sorted(parts["train"]) == sorted([*before["train"], "new0.png", "new1.png", "new2.png"])
    dataset = coco_json.load_coco(str(tmp_path / "out" / "instances_train.json"),
                                  str(tmp_path / "images"))  # fmt: skip
    labels = {name: dataset.target(k)["labels"].tolist() for k, name in enumerate(dataset.files)}
    assert dataset.names == ["cell", "rare"]
    assert [labels[f"new{k}.png"] for k in range(3)] == [[1], [2], [1]]
    # The same image in both is one claim too many; and what is no record is one line.
    with pytest.raises(UserError, match=r"two images have the file_name '0.png'"):
        own(tmp_path, "--json", *2 * [str(tmp_path / "coco.json")])
    later.write_text(json.dumps(dict(raw, images=[3])))
    with pytest.raises(UserError, match=r"more/coco.json: not COCO format"):
        own(tmp_path, "--json", str(tmp_path / "coco.json"), str(later))


def test_images_beside_the_json(tmp_path):
    """As Roboflow exports: the folder of the photos is the JSON's own."""
    export(tmp_path, {"a.png": picture(1), "b.png": picture(2)})
    (tmp_path / "coco.json").rename(tmp_path / "images" / "_annotations.coco.json")
    source, empty = tmp_path / "images" / "_annotations.coco.json", tmp_path / "empty"
    empty.mkdir()
    command = ["own", "--json", str(source), "--root", str(empty), "--out", str(tmp_path / "o")]
    with pytest.raises(UserError, match=r"a.png: not in .*empty, but beside .*; give --root "):
        prepare.run(command)
    # What is no record is told by the reader, here too.
    for spoiled in ([3], [dict(id=1)], []):
        source.write_text(json.dumps(dict(json.loads(source.read_text()), images=spoiled)))
        with pytest.raises(UserError, match=r"not COCO format|file_name|lists no image|not listed"):
            prepare.run(command)


# ---------------------------------------------------------------------------- names


def test_names_by_their_last_part(tmp_path, capsys):
    """As Label Studio names an upload and a local file, and labelme on Windows."""
    export(tmp_path, {f"{k}.png": picture(k) for k in range(6)} | {"sub/my photo.png": picture(9)})
    path = tmp_path / "coco.json"
    raw = json.loads(path.read_text())
    for k, name in enumerate([
        "images/0f3a91bc-0.png", "/data/local-files/?d=batch/1.png", "C:\\Users\\me\\2.png",
        "../../3.png", "s3://bucket/4.png", "5.png", "/data/upload/7/my%20photo.png",
    ]):  # fmt: skip
        raw["images"][k]["file_name"] = name
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"leaves the image folder.*--match-names"):
        own(tmp_path)
    parts = own(tmp_path, "--match-names", "--val", "2")
    assert sorted(parts["train"] + parts["val"]) == [*(f"{k}.png" for k in range(6)),
                                                     "sub/my photo.png"]  # fmt: skip
    assert "6 of 7 images found by the last part" in capsys.readouterr().out


def test_a_name_that_could_mean_two_files(tmp_path):
    export(tmp_path, {"a/1.png": picture(1), "b/1.png": picture(2)})
    raw = json.loads((tmp_path / "coco.json").read_text())
    # Its folder's name tells, too.
    raw["images"][0]["file_name"] = "C:\\photos\\b\\1.png"
    assert file_names.match(raw["images"][:1], tmp_path / "images", "coco.json") == 1
    assert raw["images"][0]["file_name"] == "b/1.png"
    raw["images"][0]["file_name"] = "c/1.png"
    with pytest.raises(UserError, match=r"'c/1.png': 2 images of this name"):
        file_names.match(raw["images"], tmp_path / "images", "coco.json")
    (tmp_path / "images" / "b" / "1.png").unlink()
    raw["images"][1]["file_name"] = "d/1.png"
    with pytest.raises(UserError, match=r"'d/1.png' and 'c/1.png' both mean 'a/1.png'"):
        file_names.match(raw["images"], tmp_path / "images", "coco.json")
    with pytest.raises(UserError, match="an image has no file_name: 3"):
        file_names.match([3], tmp_path / "images", "coco.json")
    # As Windows takes it.
    record = dict(file_name="C:\\photos\\1.PNG")
    assert file_names.match([record], tmp_path / "images", "coco.json") == 1
    assert record["file_name"] == "a/1.png"


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("https://bucket.example/a/photo7.jpg?X-Amz-Signature=abc/d", "photo7.jpg"),
        ("run=2.png", "run=2.png"),
        ("/data/local-files/?d=my%20photo.png", "my photo.png"),
    ],
)
def test_the_last_part_of_a_name(name, last):
    assert file_names.last_part(name) == last


def test_a_missing_image_and_the_nearest_name(tmp_path):
    export(tmp_path, {"photo_0012.jpg": picture(1), "other.jpg": picture(2)})
    path = tmp_path / "coco.json"
    path.write_text(path.read_text().replace("photo_0012.jpg", "photo_012.jpg"))
    dataset = coco_json.load_coco(str(path), str(tmp_path / "images"))
    with pytest.raises(UserError, match=r"nearest name in it is 'photo_0012.jpg'"):
        dataset.check_files()
    # The same name elsewhere is what --match-names is for.
    text = path.read_text()
    path.write_text(text.replace("photo_012.jpg", "photos/photo_0012.jpg"))
    dataset = coco_json.load_coco(str(path), str(tmp_path / "images"))
    with pytest.raises(UserError, match=r"is 'photo_0012.jpg', which prepare own --match-names"):
        dataset.check_files()
    path.write_text(text)
    with pytest.raises(UserError, match=r"no image of this name.*nearest is 'photo_0012.jpg'"):
        own(tmp_path, "--match-names")


# ---------------------------------------------------------------------------- masks


def read(tmp_path, raw: dict, encoding: str = "utf-8"):
    (tmp_path / "images").mkdir(exist_ok=True)
    (tmp_path / "tool.json").write_text(json.dumps(raw), encoding=encoding)
    return coco_json.load_coco(str(tmp_path / "tool.json"), str(tmp_path / "images"))


def test_a_polygon_without_the_list_around_it(tmp_path):
    raw = label_studio("a.png")
    for record in raw["annotations"]:
        record["segmentation"] = record["segmentation"][0]
    masks = read(tmp_path, raw).target(0)["masks"].numpy()
    for mask, polygon in zip(masks, POLYGONS, strict=True):
        assert (mask == mask_utils.decode(mask_utils.frPyObjects([polygon], 40, 60))[..., 0]).all()


def test_a_byte_order_mark(tmp_path):
    """PowerShell and Windows' editors write one."""
    assert read(tmp_path, roboflow("a.png"), "utf-8-sig").names == ["cell", "nucleus"]


def test_fractions_of_the_image(tmp_path):
    raw = roboflow("a.png")
    for record in raw["annotations"]:
        (polygon,) = record["segmentation"]
        record["segmentation"] = [[v / (60, 40)[k % 2] for k, v in enumerate(polygon)]]
    # Rounded: a little beyond the image.
    raw["annotations"][0]["segmentation"][0][2] = 1.0000004
    with pytest.raises(UserError, match=r"fractions of the image.*multiply x by the width"):
        read(tmp_path, raw)
    # Among others that are in pixels they are left out, and counted.
    raw["annotations"].append(dict(raw["annotations"][0], id=9, segmentation=[POLYGONS[0]]))
    dataset = read(tmp_path, raw)
    assert dataset.labels.tolist() == [2]
    assert any("2 annotations lie between 0 and 1" in line for line in dataset.warnings)


def test_the_same_annotation_twice(tmp_path):
    raw = roboflow("a.png")
    raw["annotations"] += [dict(record, id=90 + k) for k, record in enumerate(raw["annotations"])]
    # The same mask as another class is another claim.
    raw["annotations"].append(dict(raw["annotations"][0], id=99, category_id=1))
    dataset = read(tmp_path, raw)
    assert dataset.labels.tolist() == [2, 1, 1]
    assert any("2 annotations are duplicates" in line for line in dataset.warnings)


def test_rectangles_of_two_corners(tmp_path):
    """labelme's rectangle has two points, and older converters write just these."""
    raw = labelme2coco("a.png")
    # Drawn from the lower right to the upper left.
    raw["annotations"][0]["segmentation"] = [[30, 22, 10, 6]]
    dataset = read(tmp_path, raw)
    mask = dataset.target(0)["masks"][0].numpy()
    assert mask[6:22, 10:30].all() and mask.sum() == 16 * 20
    assert any("1 annotations give only two opposite corn" in line for line in dataset.warnings)


def test_boxes_beside_polygons_are_told_with_what_draws_masks(tmp_path):
    """As labelme2coco 0.2 writes a rectangle: no corner at all, but a box."""
    raw = labelme2coco("a.png")
    raw["annotations"][0]["segmentation"] = []
    dataset = read(tmp_path, raw)
    assert len(dataset.labels) == len(raw["annotations"]) - 1
    (said,) = dataset.warnings
    assert "1 annotations have a box but no mask" in said and "--masks-from-boxes" in said


def test_four_numbers_that_are_no_two_corners(tmp_path):
    """A sliver beside a polygon is nothing; a box is x, y, width and height; a line nothing."""
    raw = labelme2coco("a.png")
    raw["annotations"][0]["segmentation"].append([40, 30, 55, 38])
    raw["annotations"][1].update(segmentation=[[30, 5, 20, 10]], bbox=[30, 5, 20, 10])
    raw["annotations"].append(dict(raw["annotations"][1], id=9, segmentation=[[3, 3, 9, 3]]))
    first, second = read(tmp_path, raw).target(0)["masks"].numpy()
    alone = mask_utils.decode(mask_utils.frPyObjects([POLYGONS[0]], 40, 60))[..., 0]
    assert (first == alone).all()
    assert second[5:15, 30:50].all() and second.sum() == 200


@pytest.mark.parametrize("segmentation", [7, "1 2 3 4 5 6", [["a"] * 6], [[1, 2, 3, None, 5, 6]]])
def test_what_is_no_mask_names_the_record(tmp_path, segmentation):
    raw = roboflow("a.png")
    raw["annotations"][1]["segmentation"] = segmentation
    with pytest.raises(UserError, match=r"tool.json: annotation 1 has a (polygon|segmentation)"):
        read(tmp_path, raw)


# --------------------------------------------------------------------------- boxes


def boxes_alone(folder) -> dict:
    """Two images as an object detection export has them."""
    export(folder, {f"{k}.png": picture(k, 96) for k in range(2)})
    raw = json.loads((folder / "coco.json").read_text())
    for record in raw["annotations"]:
        record["segmentation"] = []
    (folder / "coco.json").write_text(json.dumps(raw))
    return raw


def test_boxes_alone_are_refused_with_what_to_do(tmp_path):
    boxes_alone(tmp_path)
    with pytest.raises(UserError, match=r"none of its 2 annotations has a mask.*--masks-from-box"):
        own(tmp_path)


def test_masks_from_boxes_are_what_sam_answers(tmp_path, capsys):
    """With the tiny SAM, whose answers to boxes mean nothing; the official one has its way."""
    raw = boxes_alone(tmp_path)
    # A photo whose JSON has the size that is stored, not the one that is shown.
    turned = picture(7, 96).crop((0, 0, 96, 64))
    turned.save(tmp_path / "images" / "1.png", exif=exif(6))
    raw["images"][1].update(width=96, height=64)
    (tmp_path / "coco.json").write_text(json.dumps(raw))
    weights = str(ROOT / "ssis" / "tiny_sam.pt")
    parts = own(tmp_path, "--val", "1", "--masks-from-boxes", weights, "--sam", "tiny")
    assert "2 masks drawn; look at them" in capsys.readouterr().out
    predictor = SamPredictor(sam.SegmentAnything("tiny", "", "cpu").net)
    for part, (name,) in parts.items():
        made = json.loads((tmp_path / "out" / f"instances_{part}.json").read_text())
        (record,), (image,) = made["annotations"], made["images"]
        pixels = read_image(str(tmp_path / "images" / name), (image["height"], image["width"]))
        predictor.set_image(pixels.permute(1, 2, 0).numpy())
        mask = predictor.predict(box=np.array([4, 4, 24, 24]), multimask_output=False)[0][0]
        assert (mask_utils.decode(record["segmentation"]) == mask).all()
        assert record["mask_from_box"] is True
        assert (tmp_path / "out" / "masks_from_boxes" / f"{name}.png").exists()


def test_masks_that_are_drawn_are_not_drawn_again(tmp_path, monkeypatch, capsys):
    """After a kill between two images, and with one box corrected since."""
    raw = boxes_alone(tmp_path)
    flags = ("--val", "1", "--masks-from-boxes", str(ROOT / "ssis" / "tiny_sam.pt"))
    asked, answers = [], masks_from_boxes.answers

    def seen(predictor, image, boxes):
        asked.append(boxes)
        if stop == len(asked):
            raise KeyboardInterrupt
        return answers(predictor, image, boxes)

    monkeypatch.setattr(masks_from_boxes, "answers", seen)
    stop = 2
    with pytest.raises(KeyboardInterrupt):
        own(tmp_path, *flags, "--sam", "tiny")
    parts = own(tmp_path, *flags, "--sam", "tiny")
    assert len(asked) == 3 and asked[1] == asked[2]
    files = [tmp_path / "out" / f"instances_{part}.json" for part in parts]
    made = [file.read_text() for file in files]
    own(tmp_path, *flags, "--sam", "tiny")
    assert len(asked) == 3 and made == [file.read_text() for file in files]
    raw["annotations"][1]["bbox"] = [4, 4, 30, 30]
    (tmp_path / "coco.json").write_text(json.dumps(raw))
    own(tmp_path, *flags, "--sam", "tiny")
    assert asked[3:] == [[[4, 4, 30, 30]]]
    assert "1 masks drawn, 1 there already; look" in capsys.readouterr().out


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[0x0112] = orientation
    return data


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(bbox=[1, 2, 0, 4]), "annotation 0 has neither a mask nor a box of x, y"),
        (dict(bbox=None), "annotation 0 has neither a mask nor a box of x, y"),
        (dict(category_id=5), "annotation 0 has category_id 5, which is not listed"),
    ],
)
def test_what_is_wrong_is_told_before_sam_is_asked(tmp_path, change, said):
    raw = boxes_alone(tmp_path)
    raw["annotations"][0].update(change, segmentation=[[]])
    (tmp_path / "coco.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=said):
        own(tmp_path, "--masks-from-boxes", "nowhere.pth")
    for odd in (3, dict(raw["annotations"][0], category_id=1, segmentation=7)):
        spoiled = dict(raw, annotations=[odd])
        (tmp_path / "coco.json").write_text(json.dumps(spoiled))
        with pytest.raises(UserError, match=r"not COCO format|neither polygons nor an RLE"):
            own(tmp_path, "--masks-from-boxes", "nowhere.pth")
    raw["annotations"][0].update(bbox=[1, 2, 8, 4], category_id=1)
    (tmp_path / "coco.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"--masks-from-boxes nowhere.pth: not found; fetch "):
        own(tmp_path, "--val", "1", "--masks-from-boxes", "nowhere.pth")
