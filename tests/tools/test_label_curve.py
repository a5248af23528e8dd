"""The label curve: runs that are there stay, and its numbers are the verdict's.

Two small runs by the command itself; the oracle is `evaluate` and `verdict.compare` on their
checkpoints.
"""

import json
from pathlib import Path

import pytest
import torch
from helpers import TINY, dataset_of, error_of
from PIL import Image, ImageOps

from ssis import config
from ssis.datasets import coco_json
from ssis.engine import resume
from ssis.report import ap, verdict
from ssis.tools import label_curve


def flags_of(shapes_folder) -> list[str]:
    # The method and the share are the curve's own.
    kept = list(map(str, TINY))
    for flag in ("--method", "--labeled"):
        if flag in kept:
            del kept[kept.index(flag) : kept.index(flag) + 2]
    return [*dataset_of(shapes_folder), *kept]


def test_the_curve_of_two_runs(shapes_folder, tmp_path, capsys):
    # The order is not the user's: from few to many.
    arguments = ["--labeled", "100%", "50%", "--output", str(tmp_path), *flags_of(shapes_folder)]
    # After so few steps it takes a hundred guesses to find something.
    arguments += ["--pretrain-steps", "24", "--warmup-steps", "8", "--max-detections", "100"]
    label_curve.main(arguments)
    out = capsys.readouterr().out
    content = json.loads((tmp_path / "label_curve.json").read_text())
    (curve,) = content.values()
    assert list(content) == ["supervised"] and curve[0]["images"] * 2 == curve[1]["images"]
    models = []
    folders = [tmp_path / f"supervised-{point['images']}" for point in curve]
    for folder in folders:
        net, _, names, _ = resume.load_model(folder / "checkpoint.pt", "")
        test_set = coco_json.load_coco(*dataset_of(shapes_folder)[9::2], names)
        models.append(ap.evaluate(net, test_set, torch.device("cpu")))
    truth = test_set.coco(range(len(test_set)))
    assert [point["ap"] for point in curve] == [m[0]["mask"]["AP"] for m in models]
    step = verdict.compare(f"{curve[0]['images']} images", *models, truth)
    assert curve[1]["compared"] == [json.loads(json.dumps(step))] and step["words"] in out
    assert "would more labels help? from " in out
    assert (tmp_path / "label_curve.png").stat().st_size > 5000
    assert all(point["ap"] > 0 for point in curve)
    # A second call makes no run, and one with other flags none either.
    before = (folders[0] / "summary.json").stat().st_mtime_ns
    label_curve.main(arguments)
    assert (folders[0] / "summary.json").stat().st_mtime_ns == before
    capsys.readouterr()
    said = error_of(capsys, label_curve.main, [*arguments, "--lr", "0.1"])
    assert "belongs to a run with other settings (--lr was" in said
    # Annotated anew: the models are of other labels.
    path = tmp_path / "train.json"
    path.write_text(Path(arguments[arguments.index("--train-json") + 1]).read_text() + " ")
    said = error_of(capsys, label_curve.main, [*arguments, "--train-json", str(path)])
    assert "has runs of other annotations than" in said


def test_with_unlabeled_images_both_methods_are_compared(shapes_folder, tmp_path, capsys):
    """Each semi-supervised model with the supervised one of the same labeled images."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in sorted(Path(dataset_of(shapes_folder)[3]).glob("*.png"))[:2]:
        # Pictures that are new: upside down.
        with Image.open(path) as image:
            ImageOps.flip(image).save(photos / path.name)
    arguments = ["--labeled", "100%", "--output", str(tmp_path / "own"), *flags_of(shapes_folder)]
    arguments += ["--method", "pl-dc", "--unlabeled-images", str(photos)]
    label_curve.main(arguments)
    out = capsys.readouterr().out
    content = json.loads((tmp_path / "own" / "label_curve.json").read_text())
    assert list(content) == ["supervised", "pl-dc"]
    (alone,), (both,) = content.values()
    assert alone["images"] == both["images"] and not alone["compared"]
    (compared,) = both["compared"]
    assert compared["name"] == "supervised" and compared["ap"] == alone["ap"]
    assert compared["words"] in out and "would more labels help" not in out
    # What the numbers are of.
    assert f"mask AP  on {dataset_of(shapes_folder)[9]}\n" in out


@pytest.mark.fast
@pytest.mark.parametrize(
    ("gain", "interval", "words"),
    [
        (5.0, (1.0, 8.0), "more labels will probably help"),
        (2.0, (-1.0, 4.0), "may be chance"),
        (-0.5, (-3.0, 2.0), "no sign that more labels would help"),
        (5.0, None, "so many test images have no interval"),
    ],
)
def test_the_answer(gain, interval, words):
    step = dict(gain=gain, interval=interval)
    said = label_curve.answer(dict(images=10), dict(images=20, ap=30.0), step)
    nothing = label_curve.answer(dict(images=10), dict(images=20, ap=0.0), step)
    assert nothing.endswith("nothing was learned; train longer, or look at the annotations")
    assert (
        words in said and f"from 10 to 20 labeled images the mask AP changed by {gain:+.1f}" in said
    )


@pytest.mark.fast
def test_shares_are_of_the_annotated_images(coco_folder, tmp_path, capsys):
    """Tools list the images that nobody has annotated, too: one of these four."""
    flags = [
        f"--{part}-{kind}={coco_folder / name}"
        for part in ("train", "val")
        for kind, name in (("json", "coco.json"), ("images", "images"))
    ]
    settings = config.parse(["--preset", "custom", "--method", "supervised", *flags])
    paths = label_curve.draw_shares(settings, ["100%", "34%"], tmp_path)
    lists = [json.loads(path.read_text())["labeled"] for path in paths]
    assert [path.name for path in paths] == ["labeled-1.json", "labeled-3.json"]
    assert lists[1] == ["0.png", "1.png", "2.png"] and lists[0][0] in lists[1]
    # Before any run, not after the others.
    said = error_of(
        capsys, label_curve.main,
        [*flags, "--preset", "custom", "--output", tmp_path / "o", "--labeled", "1", "200%"],
    )  # fmt: skip
    assert "--labeled 200%: that is 6 of 3 images" in said


@pytest.mark.fast
def test_flags_of_training_are_checked_before_any_run(tmp_path, capsys):
    said = error_of(capsys, label_curve.main, ["--output", str(tmp_path / "o"), "--lrr", "1"])
    assert "--lrr" in said and not (tmp_path / "o").exists()
