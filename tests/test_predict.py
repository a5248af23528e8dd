"""Prediction on whatever files people have: one image in many formats, one answer.

The model has random weights, and finds the same things in the same pixels. Oracles: the
RGB PNG of the image for all its other formats; pycocotools for the files that are written.
"""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

import train
from ssis import checkpoint, coco_json, config, distributed, predict

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shapes_folder):
    """A checkpoint of a run that has done nothing yet."""
    torch.manual_seed(0)
    flags = ["--preset", "custom", "--method", "supervised", "--data", str(shapes_folder)]
    settings = config.parse([*flags, "--short-side-min", "64", "--short-side", "64"])
    train_set = coco_json.load_coco(
        str(shapes_folder / "instances_train.json"), str(shapes_folder / "train")
    )
    run = train.Run(settings, train_set, distributed.start("cpu"))
    # Not all at one score: the order must mean something.
    torch.nn.init.normal_(run.net.roi_heads.box_predictor.cls_score.weight, std=0.3)
    run.net.roi_heads.detections_per_img = 5
    path = tmp_path_factory.mktemp("trained") / "checkpoint.pt"
    checkpoint.save(path, checkpoint.snapshot(run, train_set.names, 0, {}, 0.0))
    return path


def results(folder) -> dict[str, list]:
    """file name -> what was found, without image ids."""
    found = json.loads((folder / "coco.json").read_text())
    names = {record["id"]: record["file_name"] for record in found["images"]}
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
    assert said.err.count("skipped") == 1 and "broken.jpg" in said.err
    found = results(out)
    assert len(found) == 8 and "broken.jpg" not in found
    assert len(found["a.png"]) > 1
    for name, value in found.items():
        assert value == found["a.png"], name
    scores = [instance["score"] for instance in found["a.png"]]
    assert scores == sorted(scores, reverse=True) and scores[-1] >= 0.1
    # Two files of one name get a picture each.
    pictures = {p.relative_to(out / "overlays").as_posix() for p in out.rglob("overlays/**/*.png")}
    assert {"a.png", "a-2.png", "sub folder/ünï.png"} <= pictures and len(pictures) == 8
    # Each mask as a PNG, as in the JSON, and upright.
    masks = sorted((out / "masks" / "turned").iterdir())
    assert len(masks) == len(found["turned.png"])
    for path, instance in zip(masks, found["turned.png"], strict=True):
        mask = np.array(Image.open(path))
        assert mask.shape == (72, 90) and set(np.unique(mask)) <= {0, 255}
        assert (mask // 255 == mask_utils.decode(instance["segmentation"])).all()


def test_the_files_are_coco(trained, shapes_folder, tmp_path):
    """pycocotools reads them, and so does this project: results can be annotations."""
    image = sorted((shapes_folder / "val").iterdir())[0]
    out = tmp_path / "out"
    predict.main([str(trained), str(image), "--out", str(out), "--score", "0.1"])
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(out / "coco.json"))
        loaded = coco.loadRes(str(out / "results.json"))
    assert len(loaded.anns) == len(coco.anns) > 0 and not (out / "masks").exists()
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        assert mask.shape == (96, 96) and annotation["area"] == mask.sum()
    content = json.loads((out / "coco.json").read_text())
    content["images"][0]["file_name"] = image.name
    (tmp_path / "again.json").write_text(json.dumps(content))
    again = coco_json.load_coco(str(tmp_path / "again.json"), str(image.parent))
    target = again.target(0)
    full = [a for a in coco.anns.values() if a["area"] > 0]
    assert target["labels"].tolist() == [a["category_id"] for a in full]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["nowhere.png", "--out", "x"], "nowhere.png: no such file"),
        (["empty", "--out", "x"], "no image in it"),
        (["bad.png", "--out", "x"], "none of the images could be read"),
        (["good.png", "--out", "x", "--score", "2"], "--score 2.0: must be from 0 to 1"),
        (["good.png", "--out", "good.png/x"], "cannot be written"),
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
