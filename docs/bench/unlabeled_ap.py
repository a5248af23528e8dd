r"""How good is a run on its own unlabeled images? Of those whose ground truth was hidden from it.

    python docs/bench/unlabeled_ap.py runs/<name> ...

A validation part of 40 images is noisy; the images that training passed over as unlabeled are often
more, and their ground truth no run uses. (But the run has seen the images.) Printed for the first
teacher, the final student and the final teacher: mask AP, and that of each class.

Of a run with `--correction imagenet` also, over the first teacher's found instances (foreground
quality of one half or more): the fraction rightly named with each weight w of the category
classifier in PL-DC Eq. (DICC).
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from category_classifiers import first_teacher

from ssis import correction, data, filters, teacher
from ssis.datasets import coco_json
from ssis.engine import resume
from ssis.report import ap
from ssis.targets import match


def hidden(run: Path, folder: str) -> tuple[Path, dict]:
    """A COCO JSON of the run's unlabeled images with their ground truth; the run's settings."""
    settings = json.loads((run / "config.json").read_text())
    source = settings["train_json"] or f"{settings['data']}/instances_train.json"
    labeled = set(json.loads((run / "labeled.json").read_text())["labeled"])
    truth = json.loads(Path(source).read_text())
    truth["images"] = [i for i in truth["images"] if i["file_name"] not in labeled]
    ids = {i["id"] for i in truth["images"]}
    truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] in ids]
    path = Path(folder) / "hidden.json"
    path.write_text(json.dumps(truth))
    return path, settings


@torch.no_grad()
def names_by_weight(run: Path) -> list[float]:
    """The fraction of rightly named instances for w = 0, 0.1, ... 1."""
    net, dataset, settings, labeled, rest, encoder, _ = first_teacher(run / "pretrained.pt")
    view, right, count = settings.view_size, torch.zeros(11), 0
    correction.fill(encoder, net, data.Stream(dataset, labeled, view, 0, True), 0, 1)
    stream = data.Stream(dataset, rest, view, 1, True)
    for item in (stream[k] for k in range(len(rest))):
        pseudo = filters.objects(teacher.predict(net, [item["image"]], 0.1)[0])
        pseudo = pseudo[filters.foreground(pseudo) >= 0.5]
        partner = match(pseudo.boxes, item["target"]["boxes"])
        pseudo, true = pseudo[partner >= 0], item["target"]["labels"][partner[partner >= 0]]
        opinion = encoder(item["image"], pseudo)
        named = [correction.fuse(pseudo, opinion, w / 10).labels for w in range(11)]
        right += torch.stack([(labels == true).sum() for labels in named])
        count += len(true)
    return (right / max(count, 1)).tolist()


def main() -> None:
    """Print the numbers of each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    for run in parser.parse_args().runs:
        with tempfile.TemporaryDirectory() as folder:
            path, settings = hidden(run, folder)
            places = [p for p in ("train", "images") if (Path(settings["data"]) / p).is_dir()]
            images = settings["train_images"] or f"{settings['data']}/{places[0]}"
            who = [("pretrained.pt", "student"), ("checkpoint.pt", "student")]
            for name, which in (*who, ("checkpoint.pt", "teacher")):
                if not (run / name).exists():
                    continue
                net, _, names, which = resume.load_model(run / name, which)
                report, _ = ap.evaluate(net, coco_json.load_coco(str(path), images, names), "cpu")
                own = ", ".join(f"{k} {v:.1f}" for k, v in report["mask_per_class"].items())
                print(f"{run.name}, {name}, {which}: {report['mask']['AP']:.1f} ({own})")
        if settings["correction"] == "imagenet":
            each = " ".join(f"{value:.3f}" for value in names_by_weight(run))
            print(f"{run.name}, first teacher, rightly named for w = 0 to 1: {each}")


if __name__ == "__main__":
    main()
