"""Prediction on image files: one image in many formats, one answer.

The model has random weights, and detects the same things in the same pixels. Oracles: the
RGB PNG of the image for all its other formats; pycocotools for the files that are written.
"""

import contextlib
import io
import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from ssis import config, networks
from ssis.datasets import coco_json
from ssis.io import checkpoint
from ssis.report import pictures
from ssis.tools import predict


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shapes_folder):
    """A checkpoint of a run that has done nothing yet."""
    torch.manual_seed(0)
    flags = ["--preset", "custom", "--method", "supervised", "--data", str(shapes_folder)]
    settings = config.parse([*flags, "--short-side-min", "64", "--short-side", "64"])
    train_set = coco_json.load_coco(
        str(shapes_folder / "instances_train.json"), str(shapes_folder / "train")
    )
    net = networks.build_small(len(train_set.names) + 1, 64, settings.long_side)
    # Not all at one score: the order must mean something.
    torch.nn.init.normal_(net.roi_heads.box_predictor.cls_score.weight, std=0.3)
    path = tmp_path_factory.mktemp("trained") / "checkpoint.pt"
    weights = dict(student=net.state_dict(), teacher=None)
    checkpoint.save(path, dict(config=vars(settings), names=train_set.names, **weights))
    return path


def results(folder) -> dict[str, list]:
    """file name -> its detections, without image ids."""
    dataset = json.loads((folder / "coco.json").read_text())
    names = {record["id"]: record["file_name"] for record in dataset["images"]}
    by_name = {name: [] for name in names.values()}
    for result in json.loads((folder / "results.json").read_text()):
        by_name[names[result.pop("image_id")]].append(result)
    return {name.rsplit("/", 1)[-1]: value for name, value in by_name.items()}


def test_every_format_of_an_image_gives_the_same_answer(trained, tmp_path, capsys):
    rng = np.random.RandomState(0)
    pixels = np.kron(rng.randint(0, 256, (8, 10)), np.ones((9, 9))).astype(np.uint8)
    gray, folder = Image.fromarray(pixels), tmp_path / "images"
    (folder / "sub folder").mkdir(parents=True)
    rgb = gray.convert("RGB")
    rgb.save(folder / "a.png")
    rgb.save(folder / "a.tiff")
    rgb.save(folder / "sub folder" / "ünï.webp", lossless=True)
    gray.save(folder / "gray.png")
    gray.convert("P").save(folder / "palette.png")
    rgb.convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(pixels.astype(np.uint16) * 257).save(folder / "deep.png")
    # As a camera held sideways stores it.
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 not more")
    (folder / "notes.txt").write_text("no image")

    out = tmp_path / "out"
    predict.main([str(trained), str(folder), "--out", str(out), "--score", "0.1", "--masks"])
    said = capsys.readouterr()
    assert "8 of 9 images" in said.out
    assert "least sure, so worth correcting first: " in said.out
    assert said.err.count("skipped") == 1 and "broken.jpg" in said.err
    detections = results(out)
    assert len(detections) == 8 and "broken.jpg" not in detections
    assert len(detections["a.png"]) > 1
    for name, value in detections.items():
        assert value == detections["a.png"], name
    scores = [instance["score"] for instance in detections["a.png"]]
    assert scores == sorted(scores, reverse=True) and scores[-1] >= 0.1
    pictures = {p.relative_to(out / "overlays").as_posix() for p in out.rglob("overlays/**/*.png")}
    assert {"a.png.png", "a.tiff.png", "sub folder/ünï.webp.png"} <= pictures
    assert len(pictures) == 8
    # Each mask as a PNG, as in the JSON, and upright.
    masks = sorted((out / "masks" / "turned.png").iterdir())
    assert len(masks) == len(detections["turned.png"])
    for path, instance in zip(masks, detections["turned.png"], strict=True):
        mask = np.array(Image.open(path))
        assert mask.shape == (72, 90) and set(np.unique(mask)) <= {0, 255}
        assert (mask // 255 == mask_utils.decode(instance["segmentation"])).all()


def test_the_output_is_no_input_and_names_stay_apart(tmp_path):
    for name in ("one/a.png", "two/a.png", "two/A.png", "out/overlays/a.png.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    out = tmp_path / "out"
    everything = predict.find_images([str(tmp_path)], out)
    assert sorted(everything) == ["one/a.png", "two/A.png", "two/a-2.png"]
    given = [str(tmp_path / "one"), str(tmp_path / "two" / "a.png"), str(tmp_path / "one/a.png")]
    assert list(predict.find_images(given, out)) == ["a.png", "a-2.png"]
    # What is written may lie beside what is read.
    assert list(predict.find_images(given[:1], tmp_path / "one")) == ["a.png"]


def test_an_image_that_no_memory_holds_is_passed_over(trained, tmp_path, monkeypatch, capsys):
    """As a CPU's allocator says it; another error is a bug, and is not passed over."""
    for name in ("huge.png", "small.png"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    right = predict.read_image

    def full(path):
        if "huge" in path:
            torch.empty(2**60, dtype=torch.uint8)
        return right(path)

    monkeypatch.setattr(predict, "read_image", full)
    arguments = [str(trained), str(tmp_path), "--out", str(tmp_path / "out")]
    predict.main(arguments)
    assert "huge.png: too large for the memory" in capsys.readouterr().err
    assert list(results(tmp_path / "out")) == ["small.png"]

    def broken(path):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(predict, "read_image", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        predict.main(arguments)


@pytest.mark.fast
def test_the_least_sure_images_are_named_first():
    records = [dict(id=k, file_name=f"{k}.png") for k in (1, 2, 3)]
    scores = [(3, 0.6), (3, 0.8), (1, 0.9), (1, 0.7)]
    found = [dict(image_id=image, score=score) for image, score in scores]
    # By the mean, 0.7 and 0.8; there is nothing in image 2.
    assert predict.least_sure(records, found) == ["3.png", "1.png"]
    records = [dict(id=k, file_name=f"{k}.png") for k in range(1, 13)]
    found = [dict(image_id=k, score=1 - k / 100) for k in range(1, 13)]
    assert predict.least_sure(records, found) == [f"{k}.png" for k in range(12, 2, -1)]


def test_of_two_instances_in_one_place_the_surer_one_is_on_top():
    """Two classes for one object: color and name are those of the one with the higher score."""
    masks = torch.ones(2, 32, 32, dtype=torch.bool)
    draw = partial(pictures.overlay, torch.full((3, 32, 32), 0.5), masks, side=256)
    for scores in ([0.9, 0.6], [0.6, 0.9]):
        # The same two the other way round are the same picture.
        there = draw(labels=torch.tensor([1, 2]), names=["a", "b"], scores=torch.tensor(scores))
        turned = torch.tensor(scores[::-1])
        back = draw(labels=torch.tensor([2, 1]), names=["a", "b"], scores=turned)
        assert np.array_equal(there, back)
        # Of the other one not even the end of a long name shows.
        other = ["a", "b"][::-1][int(scores[1] > scores[0])]
        longer = [name + " of a long name" * (name == other) for name in ("a", "b")]
        hidden = draw(labels=torch.tensor([1, 2]), names=longer, scores=torch.tensor(scores))
        assert np.array_equal(there, hidden)
        # The line at the edge has the color of the surer one, mostly.
        surer = int(scores[1] > scores[0])
        red = np.array(there)[128, 0, 0] / 255
        colors = [color[0] / 255 for color in pictures.COLORS[:2]]
        assert abs(red - colors[surer]) < abs(red - colors[1 - surer])


def test_the_overlay_shows_the_masks_where_they_are():
    """A red square at the upper left of a large gray image, found again in the picture."""
    image = torch.full((3, 1500, 3000), 128, dtype=torch.uint8)
    mask = np.zeros((1500, 3000), np.uint8, order="F")
    mask[300:600, 300:900] = 1
    instances = [dict(category_id=1, score=0.9, segmentation=mask_utils.encode(mask))]
    picture = pictures.detections(image, instances, ["thing"], predict.LARGEST)
    picture = np.array(picture).astype(int)
    assert picture.shape == (1024, 2048, 3)
    changed = np.abs(picture - 128).max(axis=2) > 20
    xs = np.where(changed[260:400])[1]  # below the text
    assert abs(xs.min() - 300 * 2048 / 3000) < 3 and abs(xs.max() - 900 * 2048 / 3000) < 3
    assert changed[250:400, 210:610].all() and not changed[420:].any()


def test_results_are_written_when_it_is_stopped(trained, tmp_path, monkeypatch):
    for k in range(3):
        Image.new("RGB", (40, 40), (90 * k, 30, 200)).save(tmp_path / f"{k}.png")
    draw, calls = pictures.detections, []

    def stop_at_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(pictures, "detections", stop_at_the_third)
    with pytest.raises(SystemExit, match="130"):
        predict.main([str(trained), str(tmp_path), "--out", str(tmp_path / "out"), "--score", "0"])
    dataset = json.loads((tmp_path / "out" / "coco.json").read_text())
    assert [record["file_name"] for record in dataset["images"]] == ["0.png", "1.png", "2.png"]


def test_the_files_are_coco(trained, shapes_folder, tmp_path):
    """pycocotools reads them, and so does this project: results can be annotations."""
    image = sorted((shapes_folder / "val").iterdir())[0]
    out = tmp_path / "out"
    predict.main([str(trained), str(image), "--out", str(out), "--score", "0.1"])
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(out / "coco.json"))
        loaded = coco.loadRes(str(out / "results.json"))
    assert len(loaded.anns) >= len(coco.anns) > 0 and not (out / "masks").exists()
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        assert mask.shape == (96, 96) and annotation["area"] == mask.sum()
        x, y, w, h = annotation["bbox"]
        ys, xs = np.where(mask)
        assert x - 1 <= xs.min() and xs.max() <= x + w and y - 1 <= ys.min() and ys.max() <= y + h
    again = coco_json.load_coco(str(out / "coco.json"), str(image.parent))
    again.check_files()
    labels = again.target(0)["labels"].tolist()
    assert labels == [a["category_id"] for a in coco.anns.values()]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["nowhere.png", "--out", "x"], "nowhere.png: no such file"),
        (["empty", "--out", "x"], "no image in it"),
        (["bad.png", "--out", "x"], "none of the images could be read"),
        (["good.png", "--out", "x", "--score", "2"], "--score 2.0: must be from 0 to 1"),
        (["good.png", "--out", "good.png/x"], "choose another --out,"),
    ],
)
def test_bad_input_is_one_line(trained, tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.png").write_text("bad")
    Image.new("RGB", (40, 40)).save(tmp_path / "good.png")
    with pytest.raises(SystemExit) as stop:
        predict.main([str(trained), *arguments])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
