r"""The files of a run: what it was, what happened, what came out.

    config.json      every setting
    labeled.json     the split; `--labeled` takes it back
    metrics.jsonl    a line for every ten steps, and one for every evaluation
    checkpoint.pt    everything needed to go on, or to evaluate; the one before it is
                     checkpoint.previous.pt
    pretrained.pt    the same at the end of pretraining; `--pretrained` takes it
    best.pt          one model, of first teacher, students and teachers the best on the
                     validation part; to be used, not to go on from
    summary.json     the result
    report.html      all of it on one page (`ssis/report/page.py`)
    *.png            pseudo-labels, predictions, curves
    tensorboard/     the metrics once more, with `--tensorboard`

Nothing in a folder is overwritten by a run with other settings: it is refused. Only
rank 0 writes.

Read next: `ssis/report/page.py`, the page that shows them.
"""

import contextlib
import json
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where folders are not locked
    fcntl = None

from ssis import UserError
from ssis.calibration import largest_trust
from ssis.config import Config, differences, save
from ssis.io import checkpoint
from ssis.io.files import write_text, writing
from ssis.report.curves import MODELS, TITLES, read_metrics


@contextlib.contextmanager
def lock(folder: Path):
    """In this context no other process can train in the folder.

    The operating system takes the lock back when the process ends, however it ends.

    Raises:
        UserError: another process trains in it now.
    """
    if fcntl is None:
        yield
        return
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{folder}: another process trains in it now; wait for it, stop it, or "
                "give another --output"
            ) from error
        yield


def prepare(config: Config, held: contextlib.ExitStack) -> Path | None:
    """Make the run's folder, or find an unfinished run of the same settings in it.

    What is left of a run that never saved anything is cleared away: it would only stand
    in the way of the corrected command.

    Args:
        config: the settings of the run.
        held: keeps the folder locked until it is closed.

    Returns:
        The checkpoint to go on from, if there is one.

    Raises:
        UserError: another run is there, or the folder cannot be written.
    """
    folder = config.run_folder
    saved, point = folder / "config.json", folder / "checkpoint.pt"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(lock(folder))
        resumes = config.resume == "auto"
        there = point.exists() or checkpoint.previous(point).exists()
        if resumes and there and saved.exists():
            try:
                before = json.loads(saved.read_text())
            except ValueError as error:
                raise UserError(
                    f"{saved}: damaged; remove it, or give --resume never"
                ) from error
            other = differences(config, before)
            if other:
                raise UserError(
                    f"{folder}: holds a run with other settings "
                    f"({'; '.join(other[:3])}); give another --output, or --resume "
                    "never to replace it"
                )
        # Of a program that was killed while it wrote; the lock says that it is gone.
        for path in folder.glob("*.tmp"):
            path.unlink()
        going_on = checkpoint.latest(point) if resumes else None
        if resumes and not going_on and (folder / "summary.json").exists():
            raise UserError(
                f"{folder}: holds the summary of a finished run without its "
                "checkpoint; give another --output, or --resume never to replace it"
            )
        if not going_on:
            # Only what a run writes: the folder may hold more.
            strips = [path.name for path in folder.glob("pseudo_[0-9]*.png")]
            for name in (
                *strips,
                "report.html",
                "best.png",
                "worst.png",
                "predictions.png",
                "curves.png",
                "checkpoint.pt",
                "checkpoint.previous.pt",
                "best.pt",
                "best.previous.pt",
                "metrics.jsonl",
                "summary.json",
                "labeled.json",
            ):
                # A split that this run is given stays.
                if (folder / name).resolve() != Path(config.labeled).resolve():
                    (folder / name).unlink(missing_ok=True)
            for path in (folder / "tensorboard").glob("events.*"):
                path.unlink()
        save(config, saved)
    return going_on


class Metrics:
    """`metrics.jsonl`, one JSON object a line, each with its `step`.

    Args:
        path: the file.
        step: steps done; lines beyond are of steps that were lost and will be repeated.
        writes: False on all processes but the first, where `add` does nothing.
        tensorboard: write event files into `tensorboard/` beside it as well.
    """

    def __init__(self, path: Path, step: int, writes: bool, tensorboard: bool = False):
        self.path, self.writes, self.events = path, writes, None
        lines = [line for line in read_metrics(path) if line["step"] <= step]
        self._write("".join(json.dumps(line) + "\n" for line in lines), "w")
        if writes and tensorboard:
            # Imported here: an optional package.
            from torch.utils.tensorboard import SummaryWriter

            folder = path.with_name("tensorboard")
            with writing(folder):
                self.events = SummaryWriter(str(folder), purge_step=step + 1)

    def add(self, **line) -> None:
        """Append a line."""
        self._write(json.dumps(line) + "\n", "a")
        if self.events:
            for name, value in scalars(line):
                self.events.add_scalar(name, value, line["step"])
            self.events.flush()

    def _write(self, text: str, mode: str) -> None:
        if self.writes:
            with writing(self.path), open(self.path, mode, encoding="utf-8") as file:
                file.write(text)


def scalars(line: dict, prefix: str = "") -> list[tuple[str, float]]:
    """The numbers of a line, those of its dicts with the path that leads to them."""
    found = []
    for name, value in line.items():
        if isinstance(value, dict):
            found += scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            found.append((prefix + name, value))
    return found


def summary(config: Config, results: dict, counts: dict, test_set, seconds: float):
    """The content of `summary.json`; AP in percent, None for a model not there."""

    def numbers(kind: str) -> dict:
        return {
            who: results[who][kind]["AP"] if who in results else None for who in MODELS
        }

    return dict(
        method=config.method,
        **oracle_note(config),
        preset=config.preset,
        seed=config.seed,
        **counts,
        seconds=round(seconds, 1),
        # With `--pretrained` the first teacher's training is a part of the `seconds`.
        first_teacher_given=bool(config.pretrained),
        evaluated_on=test_set.source,
        test_images=len(test_set),
        mask_ap=numbers("mask"),
        box_ap=numbers("box"),
        audit=results.get("audit"),
        audit_per_class=results.get("audit_per_class"),
        # What each level did: PL-DC's correction counts most at the end of the burn-in.
        audit_stages={
            "end of burn-in": results.get("burnin", {}).get("audit_stages"),
            "end": results.get("audit_stages"),
        },
        calibration=results.get("calibration"),
        details={who: results[who] for who in MODELS if who in results},
    )


def calibration_line(measured: dict, names: list[str], refined: bool) -> str:
    """What a calibration found, in a few words.

    Args:
        measured: of `calibration.calibrate`, and the step.
        names: of the classes.
        refined: whether SAM was asked.
    """
    line = f"calibrated after step {measured['step']} on {measured['images']} images: "
    thresholds = measured["found_thresholds"]
    lowest, highest = min(thresholds), max(thresholds)
    line += f"foreground thresholds {lowest:.2f}"
    if lowest < highest:
        first, last = (names[thresholds.index(t)] for t in (lowest, highest))
        line += f" ({first}) to {highest:.2f} ({last})"
    if measured["precision"] is not None:
        line += (
            f", {measured['precision']:.0%} of what is kept lies on an instance "
            f"(recall {measured['recall']:.0%})"
        )
    if refined and measured["mask_iou"] is not None:
        taken = f"gate {measured['gate']:.2f}" if measured["gate"] <= 1 else "off"
        line += (
            f"; SAM: mask IoU {measured['mask_iou']:.2f} -> "
            f"{measured['refined_iou']:.2f}, {taken}"
        )
    if measured["disagreements"]:
        right = measured["classifier_right"], measured["teacher_right"]
        line += (
            f"; category classifier: of {measured['disagreements']} disagreements right"
            f" in {right[0]}, the teacher in {right[1]}, weight {measured['trust']:.1f}"
        )
        if measured["trust"] == largest_trust(*right) < 1:
            line += " (no more, for it is not clearly the better one)"
    if named := measured.get("named_shares"):
        annotated = measured["annotated_shares"]
        k = max(range(len(named)), key=lambda k: abs(named[k] - annotated[k]))
        # Before the first pseudo-label they are the same.
        if named[k] != annotated[k]:
            line += (
                f"; class shares: {names[k]} is the farthest off, {named[k]:.0%} of "
                f"the pseudo-labels, {annotated[k]:.0%} of what is annotated"
            )
    return line


def oracle_note(config: Config) -> dict:
    """What a summary must say when the unlabeled images' truth was used."""
    if config.oracle == "none":
        return {}
    return dict(
        oracle=config.oracle,
        warning="NOT A SEMI-SUPERVISED RESULT: the pseudo-labels were corrected with "
        f"the hidden ground truth (--oracle {config.oracle}); an upper bound only",
    )


def write_summary(folder: Path, summary: dict) -> None:
    """Write `summary.json`: the run is finished, but for pictures and report."""
    with writing(folder / "summary.json"):
        write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def table(summary: dict, folder: Path) -> str:
    """The small table that a run ends with."""
    who = [name for name, value in summary["mask_ap"].items() if value is not None]
    lines = [summary["warning"]] if "warning" in summary else []
    titles = "".join(f"{TITLES[name]:>14}" for name in who)
    lines.append(f"{'AP in percent':<16}{titles}")
    for kind in ("mask_ap", "box_ap"):
        values = "".join(f"{summary[kind][name]:14.2f}" for name in who)
        lines.append(f"{kind.replace('_ap', ''):<16}{values}")
        # Of crowded images: what COCO's own evaluation, of 100 detections, would say.
        details = [summary["details"][name][kind.replace("_ap", "")] for name in who]
        if all("AP@100" in numbers for numbers in details):
            values = "".join(f"{numbers['AP@100']:14.2f}" for numbers in details)
            lines.append(f"{kind.replace('_ap', '') + ' (of 100)':<16}{values}")
    lines.append(
        f"on {summary['evaluated_on']} ({summary['test_images']} images), "
        f"{summary['seconds'] / 60:.1f} minutes"
        + (", the first teacher's included" if summary["first_teacher_given"] else "")
    )
    if summary.get("test_is_validation"):
        lines.append(
            "this is the validation part, there is no other: settings chosen on it, "
            "and the model `best`, look better than they are"
            + ("; so does what is calibrated" if summary["calibration"] else "")
        )
    if summary.get("verdict"):
        verdict = summary["verdict"]
        lines.append(f"verdict: {verdict['sentence']}")
        lines += [f"  {line}" for line in verdict["stages"]]
        lines += [f"  to change: {line}" for line in verdict["advice"]]
    if summary["audit"]:
        audit = summary["audit"]
        shown = ", ".join(
            f"{key.replace('_', ' ')} {'-' if value is None else round(value, 2)}"
            for key, value in audit.items()
        )
        lines.append(f"pseudo-labels: {shown}")
        keys = ("pseudo_per_image", "box_precision", "class_accuracy", "mask_iou")
        for when, stages in summary["audit_stages"].items():
            for stage, numbers in (stages or {}).items():
                if stage == "final":
                    continue
                values = ("-" if numbers[key] is None else numbers[key] for key in keys)
                shown = ", ".join(
                    f"{key.replace('_', ' ')} {value}"
                    for key, value in zip(keys, values, strict=True)
                )
                lines.append(f"  {when:<14} {stage:<9} {shown}")
    lines.append(f"to look at: {folder}/report.html")
    lines.append(f"files: {folder}/ (summary.json, checkpoint.pt, metrics.jsonl, ...)")
    return "\n".join(lines)
