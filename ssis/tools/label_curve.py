r"""Would more labels help? The label curve of one's own data.

    python -m ssis study own --labeled 25% 50% 100% FLAGS
    python -m ssis study own --labeled 25% 50% 100% --preset photos --data data/animals

The question before another week of annotating. Parts of the labeled images are trained
on, as if the others had never been annotated, by supervised training, and with
`--unlabeled-images` by the semi-supervised method too. `FLAGS` are those of train.py.
Each step of the curve is judged as a run's verdict is (`ssis/report/verdict.py`): by
the difference on the same test images, with its 95 % interval. A curve that still rises
at its end says that more labels would help; one that is flat, that something else is
short: steps, resolution, a clearer definition of the classes.

A run that is there is not made again: the same command goes on. `label_curve.json` has
the numbers, `label_curve.png` the curve.

Read next: `ssis/report/verdict.py`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib
from tqdm import tqdm

from ssis import UserError, config, distributed
from ssis.datasets import coco_json, parts
from ssis.engine import resume
from ssis.io.files import write_text, writing
from ssis.report import ap, verdict

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TRAIN = Path(__file__).resolve().parents[2] / "train.py"


def train(folder: Path, flags: list[str]) -> None:
    """One run, unless it is there.

    Raises:
        UserError: it ended otherwise, or the folder has one with other flags.
    """
    flags = [*flags, "--output", str(folder)]
    settings = config.parse(flags)
    if (folder / "summary.json").exists():
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        other = config.differences(settings, saved, config.not_in_result())
        if other:
            raise UserError(
                f"{folder}: is of a run with other settings ({'; '.join(other[:3])}); "
                "give another --output"
            )
        return
    status = subprocess.run([sys.executable, str(TRAIN), *flags]).returncode
    if status or not (folder / "summary.json").exists():
        raise UserError(f"{folder}: the run is not complete; the same command goes on")


def measure(folder: Path, device) -> dict:
    """A run's final model on the test part.

    Returns:
        images (labeled), ap, interval (of the AP itself, in percent, or None), and what
        a comparison needs: `found` (numbers, results), `truth`, `limit`.
    """
    net, settings, names, _ = resume.load_model(folder / "checkpoint.pt", "")
    test_set = coco_json.load_coco(*parts.part_paths(settings, "test"), names)
    found = ap.evaluate(net.to(device), test_set, device)
    truth, limit = test_set.coco(range(len(test_set))), net.roi_heads.detections_per_img
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return dict(
        images=summary["labeled"],
        ap=found[0]["mask"]["AP"],
        # Against a model that finds nothing, whose AP is 0 in every draw.
        interval=verdict.paired_interval(truth, [], found[1], limit),
        found=found,
        truth=truth,
        limit=limit,
    )


def compare(name: str, before: dict, after: dict) -> dict:
    """`verdict.compare` of two measurements."""
    more = (after["truth"], after["limit"])
    return verdict.compare(name, before["found"], after["found"], *more)


def answer(before: dict, after: dict, step: dict) -> str:
    """The sentence that the question is answered with.

    Args:
        before, after: the last two measurements of supervised training.
        step: their comparison.
    """
    low, high = step["interval"] or (step["gain"], step["gain"])
    said = (
        f"from {before['images']} to {after['images']} labeled images the mask AP "
        f"changed by {step['gain']:+.1f} (95 % interval {low:+.1f} to {high:+.1f}): "
    )
    if low > 0:
        return said + "more labels will very likely help"
    if high < 0 or step["gain"] <= 0:
        return said + "no sign that more labels would help; look for what else is short"
    return said + "may be chance; judge by more images before you annotate more"


def draw(path: Path, curves: dict[str, list[dict]]) -> None:
    """The curve of each method, with the intervals of its points."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for method, points in curves.items():
        images, aps = [p["images"] for p in points], [p["ap"] for p in points]
        ends = [p["interval"] or (p["ap"], p["ap"]) for p in points]
        down = [max(0.0, a - low) for a, (low, _) in zip(aps, ends, strict=True)]
        up = [max(0.0, high - a) for a, (_, high) in zip(aps, ends, strict=True)]
        axes.errorbar(images, aps, (down, up), marker="o", capsize=4, label=method)
    axes.set(xlabel="labeled images", ylabel="mask AP, test part", xscale="log")
    ticks = sorted({p["images"] for points in curves.values() for p in points})
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    with writing(path):
        figure.savefig(path, dpi=120)
    plt.close(figure)


def run(argv: list[str] | None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ssis study own",
        usage="%(prog)s [--labeled SHARE ...] [--output D] FLAGS of train.py",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--labeled", nargs="+", default=["25%", "50%", "100%"])
    parser.add_argument("--output", type=Path, default=Path("runs/own"))
    args, flags = parser.parse_known_args(argv)
    settings = config.parse(flags)
    methods = ["supervised"]
    if settings.unlabeled_images and settings.method != "supervised":
        methods.append(settings.method)
    runs = {
        (method, share): args.output / f"{method}-{share.replace('%', 'pct')}"
        for share in args.labeled
        for method in methods
    }
    print(f"{len(runs)} runs in {args.output}/; the same command goes on after a stop")
    for (method, share), folder in runs.items():
        train(folder, [*flags, "--method", method, "--labeled", share])
    _, _, device = distributed.start(settings.device)
    measured = {
        key: measure(folder, device)
        for key, folder in tqdm(runs.items(), unit="model", desc="on the test part")
    }
    curves, lines = {}, []
    for method in methods:
        curves[method] = [measured[method, share] for share in args.labeled]
        for k, (share, point) in enumerate(
            zip(args.labeled, curves[method], strict=True)
        ):
            against = []
            if k:
                against.append(
                    compare(args.labeled[k - 1], curves[method][k - 1], point)
                )
            if method != "supervised":
                against.append(
                    compare("supervised", measured["supervised", share], point)
                )
            point["compared"] = against
            line = f"{method:<20} {share:>6} {point['images']:>7} {point['ap']:>8.1f}  "
            lines.append(line + "; ".join(one["words"] for one in against))
    print(f"{'':<20} {'':>6} {'images':>7} {'mask AP':>8}")
    print("\n".join(lines))
    points = curves["supervised"]
    if len(points) > 1:
        print(
            "would more labels help? " + answer(*points[-2:], points[-1]["compared"][0])
        )
    kept = ("images", "ap", "interval", "compared")
    content = {m: [{k: p[k] for k in kept} for p in ps] for m, ps in curves.items()}
    path = args.output / "label_curve.json"
    with writing(path, "--output"):
        write_text(path, json.dumps(content, indent=1) + "\n")
    draw(args.output / "label_curve.png", curves)
    print(f"to look at: {args.output / 'label_curve.png'}")


def main(argv: list[str] | None = None) -> None:
    """`run`, with one line and status 2 for what the user did wrong."""
    distributed.program(run, argv)
