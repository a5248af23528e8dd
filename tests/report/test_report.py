"""The page of a run, its curves, its event files; best and worst test images.

Claims: the page is whole (every tag closed), needs nothing from elsewhere, has the numbers
of the summary and no markup from a class name; it can be made of an unfinished run;
panoptic quality is what the paper's formula gives by hand; the event files hold what
metrics.jsonl holds, without steps that were lost.
"""

import dataclasses
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ssis import UserError, config
from ssis.datasets import coco_json
from ssis.datasets.rle import encode
from ssis.engine import run_folder
from ssis.report import curves, page

pytestmark = pytest.mark.fast


def rle(*boxes, size=(40, 60)) -> dict:
    """The mask of some boxes (top, left, bottom, right)."""
    mask = np.zeros(size, np.uint8, order="F")
    for top, left, bottom, right in boxes:
        mask[top:bottom, left:right] = 1
    return encode(mask)


def dataset_of(tmp_path, annotations, images=1, names=("cat", "dog")):
    """Images of 40 x 60 pixels; annotations (image, class, crowd, RLE)."""
    raw = dict(
        images=[dict(id=k, file_name=f"{k}.png", height=40, width=60) for k in range(images)],
        categories=[dict(id=k, name=name) for k, name in enumerate(names, 1)],
        annotations=[
            dict(id=n, image_id=image, category_id=label, iscrowd=crowd, segmentation=mask)
            for n, (image, label, crowd, mask) in enumerate(annotations, 1)
        ],
    )
    for k in range(images):
        Image.new("RGB", (60, 40), (60 * k, 90, 30)).save(tmp_path / f"{k}.png")
    (tmp_path / "coco.json").write_text(json.dumps(raw))
    return coco_json.load_coco(str(tmp_path / "coco.json"), str(tmp_path))


def detection(label, mask, score=0.9, image=0) -> dict:
    return dict(image_id=image, category_id=label, score=score, segmentation=mask)


LEFT, RIGHT = (0, 0, 20, 20), (20, 40, 40, 60)


@pytest.mark.parametrize(
    ("detections", "expected"),
    [
        # 20 of 20 columns, and 12 of them: IoU 0.6.
        ([detection(1, rle(LEFT)), detection(2, rle(RIGHT))], 1.0),
        ([detection(1, rle((0, 0, 20, 12))), detection(2, rle(RIGHT))], 0.8),
        # 9 of 20 columns is no match: one right, one wrong, one missed.
        ([detection(1, rle((0, 0, 20, 9))), detection(2, rle(RIGHT))], 1 / 2),
        # The wrong class is no match either.
        ([detection(2, rle(LEFT)), detection(2, rle(RIGHT))], 1 / 2),
        # Detected twice: the second is wrong. 2 right, 1 wrong: 2 / 2.5.
        ([detection(1, rle(LEFT)), detection(1, rle(LEFT)), detection(2, rle(RIGHT))], 0.8),
        # A score too low to count.
        ([detection(1, rle(LEFT)), detection(2, rle(RIGHT), 0.4)], 1 / 1.5),
        ([], 0.0),
        # What lies on a crowd is neither right nor wrong.
        (
            [detection(1, rle(LEFT)), detection(2, rle(RIGHT)), detection(1, rle((31, 0, 39, 20)))],
            1.0,
        ),
    ],
)
def test_panoptic_quality_by_hand(tmp_path, detections, expected):
    annotations = [(0, 1, 0, rle(LEFT)), (0, 2, 0, rle(RIGHT)), (0, 1, 1, rle((30, 0, 40, 30)))]
    dataset = dataset_of(tmp_path, annotations)
    assert page.quality(dataset, 0, detections) == pytest.approx(expected)


def test_an_empty_image_is_neither_good_nor_bad(tmp_path):
    dataset = dataset_of(tmp_path, [(0, 1, 1, rle(LEFT))])
    assert page.quality(dataset, 0, []) is None
    assert page.quality(dataset, 0, [detection(1, rle(RIGHT))]) == 0.0


def finished(folder, dataset, names):
    """The folder of a run of a few steps, with the numbers of its end."""
    settings = config.parse(["--method", "pl-dc", "--correction", "none"])
    folder.mkdir()
    config.save(settings, folder / "config.json")
    metrics = run_folder.Metrics(folder / "metrics.jsonl", 0, True)
    losses = {f"{part}/loss_mask": 0.5 for part in ("labeled", "unlabeled")}
    audit = dict(
        pseudo_per_image=1.5, labeled_per_image=2.0, box_precision=0.75,
        class_accuracy=None, mask_iou=0.625, recall=0.5,
    )  # fmt: skip
    for step in (10, 20):
        metrics.add(step=step, stage="mutual", lr=1e-3, **losses)
        metrics.add(step=step, val_mask_ap_student=30.0, val_mask_ap_teacher=None, audit=audit)
    per_class = {name: 12.34 for name in names}
    numbers = {n: 43.21 for n in ("AP", "AP50", "AP75", "APs", "APm")} | {"APl": None}
    models = {
        who: dict(mask=numbers, box=numbers, mask_per_class=per_class)
        for who in ("pretrained", "student", "teacher")
    }
    results = models | dict(
        audit=audit,
        audit_per_class={name: audit for name in names},
        audit_stages=dict(predicted=audit, kept=audit, final=audit),
    )
    counts = dict(labeled=2, unlabeled=3, steps=20)
    summary = run_folder.summary(settings, results, counts, dataset, 66.0)
    run_folder.write_summary(folder, summary)


class Page(HTMLParser):
    """Which tags are open, which addresses are referred to, and the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.words = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.addresses += [v for k, v in attributes if k in ("src", "href", "xlink:href")]
        if tag not in ("meta", "img", "br", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def test_the_page_is_whole_and_has_the_numbers(tmp_path):
    names = ["cat", "<script>alert('dog')</script>"]
    annotations = [(k, 1 + k % 2, 0, rle(LEFT)) for k in range(9)]
    dataset = dataset_of(tmp_path, annotations, images=9, names=names)
    detections = [detection(1 + k % 2, rle((0, 0, 20, 20 - k)), image=k) for k in range(9)]
    folder = tmp_path / "run"
    finished(folder, dataset, names)
    for step in range(1, 10):
        Image.new("RGB", (8, 8)).save(folder / f"pseudo_{step:06d}.png")
    page.finish(folder, dataset, detections)
    for name in ("curves.png", "predictions.png", "best.png", "worst.png"):
        assert Image.open(folder / name).size[0] > 100, name
    text = (folder / "report.html").read_text()
    seen = Page(text)
    assert seen.open == [] and "<script" not in text
    # Nothing is fetched: pictures are inside, SVG refers to its own parts.
    assert all(a.startswith(("data:image/png;base64,", "#")) for a in seen.addresses)
    assert len([a for a in seen.addresses if a.startswith("data:")]) == page.STRIPS + 2
    assert "after step 1" in seen.words and "after step 9" in seen.words
    assert "43.2" in seen.words and "12.3" in seen.words and names[1] in seen.words
    assert "shapes-pl-dc-correction-none-5pct-s0" in seen.words
    # Settings that differ from the default run are at hand, the others behind a click.
    changed, unchanged = text.split("settings as they are by default")
    assert "<td>--correction</td><td>&#x27;none&#x27;</td>" in changed
    assert "<td>--seed</td>" in unchanged and "<td>--seed</td>" not in changed


def test_best_and_worst_are_the_best_and_the_worst(tmp_path, monkeypatch):
    annotations = [(k, 1, 0, rle(LEFT)) for k in range(9)]
    dataset = dataset_of(tmp_path, annotations, images=9)
    # Image 0 is perfect, image 8 the least so.
    detections = [detection(1, rle((0, 0, 20, 20 - k)), image=k) for k in range(9)]
    drawn = {}
    monkeypatch.setattr(
        page.pictures,
        "predictions",
        lambda dataset, results, indices, path, notes=None: drawn.update(
            {path.name: (indices, notes)}
        ),
    )
    page.draw_predictions(tmp_path, dataset, detections)
    assert drawn["best.png"][0] == [0, 1, 2, 3, 4, 5]
    assert drawn["worst.png"][0] == [8, 7, 6, 5, 4, 3]
    assert drawn["worst.png"][1][0] == "8.png: PQ 0.60"


def test_an_unfinished_run_has_a_page_and_another_folder_has_none(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    config.save(config.Config(), folder / "config.json")
    page.main([str(folder)])
    seen = Page((folder / "report.html").read_text())
    assert seen.open == [] and "not finished" in seen.words
    for other in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(SystemExit) as stop:
            page.main([str(other)])
        assert stop.value.code == 2
        assert "not the folder of a run" in capsys.readouterr().err
    (folder / "config.json").write_text('{"preset": ')
    with pytest.raises(UserError, match="not the folder of a run"):
        page.write(folder)


def test_event_files_hold_the_metrics_and_no_lost_step(tmp_path):
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed",
    )
    path = tmp_path / "metrics.jsonl"
    metrics = run_folder.Metrics(path, 0, True, tensorboard=True)
    audit = dict(box_precision=0.75, class_accuracy=None)
    metrics.add(step=10, stage="burn-in", **{"labeled/loss_mask": 0.5}, audit=audit)
    metrics.add(step=20, **{"labeled/loss_mask": 0.25})
    # Killed, and resumed from a checkpoint of step 10: step 20 comes again.
    metrics = run_folder.Metrics(path, 10, True, tensorboard=True)
    metrics.add(step=20, **{"labeled/loss_mask": 0.125})
    written = events.EventAccumulator(str(tmp_path / "tensorboard"))
    written.Reload()
    losses = [(e.step, e.value) for e in written.Scalars("labeled/loss_mask")]
    assert losses == [(10, 0.5), (20, 0.125)]
    assert [e.value for e in written.Scalars("audit/box_precision")] == [0.75]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20]


def test_tensorboard_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--tensorboard: .* pip install tensorboard"):
        config.parse(["--tensorboard"])


def test_tensorboard_is_no_other_run():
    one, other = config.Config(), dataclasses.asdict(config.Config(tensorboard=True))
    assert config.differences(one, other) == []


def test_a_panel_without_a_curve_says_why(tmp_path):
    """Bare photos have no ground truth, so their pseudo-labels are not audited."""
    line = {"step": 10, "labeled/loss_mask": 0.5, "val_mask_ap_student": 3.0, "audit": None}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line))
    figure = curves.draw(tmp_path)
    loss, ap, audit = ([text.get_text() for text in axes.texts] for axes in figure.axes)
    assert loss == ap == [] and "no ground truth" in audit[0]
    curves.plt.close(figure)
