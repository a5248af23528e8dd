r"""Would more labels help? The label curve of one's own data.

    python -m ssis study own --labeled 25% 50% 100% FLAGS
    python -m ssis study own --labeled 25% 50% 100% --preset photos --data data/animals

The question before another week of annotating. Parts of the labeled images are trained
on, as if the others had never been annotated, by supervised training, and with
`--unlabeled-images` by the semi-supervised method too. `FLAGS` are those of train.py.
Each step of the curve is judged as a run's verdict is (`ssis/report/verdict.py`): by
the difference on the same test images, with its 95 % interval. A curve that still rises
at its end says that more labels would help; one that is flat, that something else is
short: steps, resolution, a clearer definition of the classes. One run for each point:
another seed would give another curve.

A run that is there is not made again: the same command goes on. `label_curve.json` has
the numbers, `label_curve.png` the curve.

Read next: `ssis/report/verdict.py`.
"""

import argparse
import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib
from tqdm import tqdm

from ssis import UserError, config, distributed, networks
from ssis.datasets import coco_json, parts, split
from ssis.engine import resume
from ssis.io import program
from ssis.io.files import write_text, writing
from ssis.report import ap, verdict

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TRAIN = Path(__file__).resolve().parents[2] / "train.py"


def draw_shares(settings: config.Config, shares: list[str], folder: Path) -> list[Path]:
    """A split for each share of the images that have an annotation, the smallest first.

    Args:
        settings: of all the runs.
        shares: as for `--labeled`.
        folder: gets `labeled-<number of images>.json`.

    Raises:
        UserError: a share of nothing; or the runs in the folder are of other data.
    """
    source, images = parts.part_paths(settings, "train")
    train_set = coco_json.load_coco(source, images)
    pool, _ = split.draw_split(train_set, "annotated", 0)
    drawn = {}
    for share in shares:
        chosen, warnings = split.draw_split(train_set, share, settings.seed, pool)
        drawn[len(chosen)] = chosen
        for line in warnings:
            print(f"warning: {share}: {line}", file=sys.stderr)
    # Annotations change from round to round, and a run is of those it was trained on.
    content = hashlib.blake2b(digest_size=16)
    for path in (source, parts.part_paths(settings, "test")[0]):
        content.update(Path(path).read_bytes())
    mark = folder / "data.txt"
    if mark.exists() and mark.read_text() != content.hexdigest():
        raise UserError(
            f"{folder}: has runs of other annotations than {source} has now; give "
            "another --output"
        )
    with writing(mark, "--output"):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(mark, content.hexdigest())
        paths = [folder / f"labeled-{count}.json" for count in sorted(drawn)]
        for path, chosen in zip(paths, sorted(drawn.values(), key=len), strict=True):
            split.write_split(train_set, chosen, path, settings.seed)
    return paths


def train(folder: Path, flags: list[str]) -> None:
    """One run, unless it is there.

    Raises:
        UserError: the folder has a run with other flags.
        SystemExit: it ended otherwise than it should, and has said why.
    """
    flags = [*flags, "--output", str(folder)]
    settings = config.parse(flags)
    if (folder / "summary.json").exists():
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        other = config.differences(settings, saved, config.not_in_result())
        if other:
            raise UserError(
                f"{folder}: belongs to a run with other settings "
                f"({'; '.join(other[:3])}); give another --output"
            )
        return
    run = subprocess.Popen([sys.executable, str(TRAIN), *flags])
    try:
        status = run.wait()
    finally:
        # Stopped: the run saves its last step, and goes on from there the next time.
        if run.poll() is None:
            run.terminate()
            run.wait()
    if status or not (folder / "summary.json").exists():
        sys.exit(status or 130)


def measure(folders: list[Path], device) -> list[dict]:
    """The final models of some runs on the test part, or else the validation part.

    Returns:
        For each run images (labeled), ap, interval (of the AP itself, in percent, or
        None), and what a comparison needs: found (numbers and results), truth, limit.

    Raises:
        UserError: the test part has no instance.
    """
    loaded = [resume.load_model(folder / "checkpoint.pt", "") for folder in folders]
    # As many detections of each, or a step of the curve would be one of the limit.
    limit = max(net.roi_heads.detections_per_img for net, *_ in loaded)
    measured = []
    for folder, (net, settings, names, _) in zip(folders, tqdm(loaded), strict=True):
        test_set = coco_json.load_coco(*parts.part_paths(settings, "test"), names)
        networks.set_detections(net, limit)
        found = ap.evaluate(net.to(device), test_set, device)
        if found[0]["mask"]["AP"] is None:
            raise UserError(f"{test_set.source}: has no instance to judge by")
        truth = test_set.coco(range(len(test_set)))
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        measured.append(
            dict(
                images=summary["labeled"],
                ap=found[0]["mask"]["AP"],
                # Against a model that finds nothing, whose AP is 0 in every draw.
                interval=verdict.paired_interval(truth, [], found[1], limit),
                found=found,
                truth=truth,
                limit=limit,
            )
        )
    return measured


def judged_by(settings) -> str:
    """In words: the JSON of the test part, and whether it served for anything else."""
    source, _ = parts.part_paths(settings, "test")
    if source == parts.part_paths(settings, "val")[0]:
        return f"{source} (the validation part: settings chosen on it look better)"
    return source


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
    said = (
        f"from {before['images']} to {after['images']} labeled images the mask AP "
        f"changed by {step['gain']:+.1f}"
    )
    if after["ap"] == 0:
        return said + ": nothing was learned; train longer, or look at the annotations"
    if not step["interval"]:
        return said + "; so many test images have no interval"
    low, high = step["interval"]
    said += f" (95 % interval {low:+.1f} to {high:+.1f}): "
    if low > 0:
        return said + "more labels will probably help"
    if step["gain"] <= 0:
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
    axes.set(xlabel="labeled images", ylabel="mask AP", xscale="log")
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
    settings = config.parse([*flags, "--method", "supervised"])
    # SIGTERM as Ctrl-C: the run must be stopped too, or it would go on alone.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _, size, device = distributed.start(settings.device)
    if size > 1:
        raise UserError("study own: starts its runs itself; call it without torchrun")
    methods = ["supervised"]
    if (
        settings.unlabeled_images
        and (method := config.parse(flags).method) not in methods
    ):
        methods.append(method)
    splits = draw_shares(settings, args.labeled, args.output)
    runs = {
        (method, path): args.output / f"{method}-{path.stem.removeprefix('labeled-')}"
        for path in splits
        for method in methods
    }
    print(f"{len(runs)} runs in {args.output}/; the same command goes on after a stop")
    for (method, path), folder in runs.items():
        train(folder, [*flags, "--method", method, "--labeled", str(path)])
    measured = dict(zip(runs, measure(list(runs.values()), device), strict=True))
    curves = {m: [measured[m, path] for path in splits] for m in methods}
    print(f"{'labeled images':<24} {'mask AP':>8}  on {judged_by(settings)}")
    for method, points in curves.items():
        for k, point in enumerate(points):
            point["compared"] = []
            if k:
                name = f"{points[k - 1]['images']} images"
                point["compared"].append(compare(name, points[k - 1], point))
            if method != "supervised":
                alone = curves["supervised"][k]
                point["compared"].append(compare("supervised", alone, point))
            words = "; ".join(one["words"] for one in point["compared"])
            print(f"{method:<18} {point['images']:>5} {point['ap']:>8.1f}  {words}")
    points = curves["supervised"]
    if len(points) > 1:
        step = points[-1]["compared"][0]
        print(f"would more labels help? {answer(*points[-2:], step)}")
    kept = ("images", "ap", "interval", "compared")
    content = {m: [{k: p[k] for k in kept} for p in ps] for m, ps in curves.items()}
    path = args.output / "label_curve.json"
    with writing(path, "--output"):
        write_text(path, json.dumps(content, indent=1) + "\n")
    draw(args.output / "label_curve.png", curves)
    print(f"to look at: {args.output / 'label_curve.png'}")


def main(argv: list[str] | None = None) -> None:
    """`run`, with one line and status 2 for what the user did wrong."""
    program.run(run, argv)
