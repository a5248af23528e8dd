r"""Studies: named lists of settings times seeds, run until all results are there.

    python -m ssis study                          what there is, and how much is done
    python -m ssis study ladder --processes 2     run what is missing, two at a time

A number in a table is a claim, and a claim needs the run behind it. So a study says in
one place which runs a table is made of (`STUDIES`), runs those whose result is missing,
and keeps the raw result of each, with all its settings, in `docs/results/<study>.json`;
`docs/scripts/make_results.py` makes tables and plots of these files, and nothing is
typed.

*The file of results is the state.* A finished run is written there at once; the same
command goes on after a kill, on another machine too, and runs that were under way
are resumed by `train.py` itself. A result counts as long as the settings that the study
has now are those it was made with: change a flag or a default, and those runs are
due again, and the old results stay in the file until the new ones are there. A run
that another study has already made is taken from there.

*Runs with the same pretraining share it.* All the rows of a table that differ in the
semi-supervised part alone start from one first teacher (`--pretrained`), on the same
machine bit for bit the one that each would have made, which saves half of the time.

Read next: `docs/results.md`, which is what came out.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from ssis import UserError, config
from ssis.io.files import write_text

ROOT = Path(__file__).resolve().parents[2]
RESULTS, RUNS = ROOT / "docs" / "results", Path("runs")


@dataclass(frozen=True)
class Study:
    """What one table is made of.

    Attributes:
        title: heading of its section in docs/results.md.
        text: what the table shows and how it is to be read.
        rows: name of a row -> its flags of train.py.
        seeds: each row is run once with each.
        common: flags of all rows.
        data: whether the dataset's folder must be given (`--data`).
        once: rows that are run with the first seed alone.
        judged: whether the table has the gain over supervised training, run by run.
    """

    title: str
    text: str
    rows: dict[str, str]
    seeds: tuple[int, ...]
    common: str = ""
    data: bool = False
    once: tuple[str, ...] = ()
    judged: bool = False

    @property
    def runs(self) -> list[tuple[int, str]]:
        """Seed and row of every run; seed by seed: a part of it is a study too."""
        return [
            (seed, row)
            for seed in self.seeds
            for row in self.rows
            if row not in self.once or seed == self.seeds[0]
        ]


GD = "--method guided-distillation"
# A third longer than the default run, which is to end within ten minutes on two cores.
LONGER = "--pretrain-steps 900 --mutual-steps 600 --eval-every 250"
# Until 2026-11-30 the built-in data were trained without scale jitter, and until
# 2026-12-01 without pasted labeled images.
ONE_SIZE = f"{LONGER} --short-side-min 96 --arp none"
# Both papers as published, in one loop.
BOTH = (
    "--method full --filter adaptive --structure-weight 1 --structure-boundary 0 "
    "--refine iou --refine-gate 0 --no-refine-calibrate"
)
# Both papers; without pasted labeled images, also parts of theirs alone.
LADDER = {
    "supervised": "--method supervised",
    "guided-distillation": GD,
    "pl-dc (all three)": "--method pl-dc",
    "s4m (as published)": "--method s4m",
    "pl-dc + s4m as published": BOTH,
    "full, adaptive filter": "--method full --filter adaptive",
    "full (both papers, own parts)": "--method full",
    "all labels": "--method supervised --labeled 100%",
    "supervised, no pasting": "--method supervised --arp none",
    "guided-distillation, no pasting": f"{GD} --arp none",
    "+ correction, no pasting": f"{GD} --arp none --correction prototypes",
    "+ refinement, no pasting": f"{GD} --arp none --refine agreement",
    "+ copy-paste of unlabeled": f"{GD} --arp unlabeled",
    "full, no pasting of labels": "--method full --arp unlabeled",
    "oracle: both, no pasting": f"{GD} --arp none --oracle both",
    "all labels, no pasting": "--method supervised --labeled 100% --arp none",
}

# Real microscope images: fewer, larger, crowded with one class.
NUCLEI = (
    "--preset custom --labeled-batch 4 --unlabeled-batch 4 --eval-every 2000 "
    "--pretrain-steps 400 --burnin-steps 50 --mutual-steps 350 --unsup-weight 0.3"
)

# Photographs, from ImageNet's features; the weights lie where the study is run.
PHOTOS = "--preset photos --backbone-weights tf_efficientnet_lite0.pth"
PHOTO_ROWS = {
    "supervised": "--method supervised",
    "guided-distillation": GD,
    "full": "--method full",
    "supervised, copy-paste": "--method supervised --arp labeled",
    "s4m, without SAM": "--method s4m",
    "all labels": "--method supervised --labeled 100%",
}
# Three seeds for the rows that are compared; the others show where the gain comes from.
PHOTO_ONCE = tuple(PHOTO_ROWS)[3:]
PHOTO_TEXT = (
    " Every method has the same augmentation of labeled images, scale jitter; "
    "pasting them into each other as well makes supervised training worse. Official "
    "SAM weights could not be had, so S4M's gains on photographs are not measured "
    "here: `s4m` is without SAM (its copy-paste alone), `full` without both. `pl-dc` "
    "is no row of its own: without SAM it is `full`, bit for bit. "
    "`full` is PL-DC's levels with this project's parts: category correction by "
    "ImageNet's features and measured thresholds. Settings were chosen on the "
    "validation parts with seeds 3 and 4, which are not in the table; those of the "
    "supervised stage and of Guided Distillation also by trials with seed 0, of "
    "which test numbers with older settings had been seen (docs/log.md). No "
    "training image is a near-duplicate of a test image "
    "(docs/results/log-near-duplicates.txt). Rows with one run are marked by it."
)

# `s4m` and `full` as they were until 2026-11-25. Studies that have not been made anew
# since then have them; the category correction was another one then, too.
S4M_BEFORE = "--method s4m --arp unlabeled --refine agreement --refine-gate 0.5"
FULL_BEFORE = (
    "--method full --arp unlabeled --filter adaptive --no-refine-calibrate "
    "--structure-boundary 0"
)
BEFORE = (
    " Made before 2026-11-25: S4M with the candidate that agrees best and a gate "
    "of 0.5, `full` with PL-DC's adaptive filter and without the mask loss's "
    "calibration, and category correction in which the teacher's distribution still "
    "had its background (docs/log.md)."
)

STUDIES = {
    "ladder": Study(
        title="The ladder: built-in shapes, 5 % labeled (64 of 1,280 images)",
        text="From supervised training to both papers, parts of theirs alone on top of "
        "Guided Distillation (without pasting), and the headroom: `oracle: both` "
        "replaces classes and masks of Guided Distillation's pseudo-labels by "
        "hidden ground truth, which no method may see, and so bounds Guided "
        "Distillation, not `full`; `all labels` is supervised training with all "
        "1,280 images. All rows take the same number of steps, and all have the "
        "same augmentation of labeled images: scale jitter, the short side being "
        "drawn from 72 to 96 pixels, and instances pasted into other labeled "
        "images, first teachers too (not those of S4M's distillation, which needs "
        "the images as SAM saw them). The last rows are without pasted labeled "
        "images; they were made when pseudo-labels that overlap still hid each "
        "other after S4M's copy-paste. `s4m` is S4M as published. `full` is both "
        "papers and this project's parts: thresholds, SAM's gate and the weight of "
        "the correction are measured on the 128 validation images, SAM's candidate "
        "is the one that agrees best with the teacher's mask, and the mask loss is "
        "calibrated by their agreement; it is without structural distillation, as "
        "by default with the small model. The settings of PL-DC, S4M and `full` "
        "were chosen with seeds 3 and 4, which are not in the table, without jitter "
        "and pasting. Those of the training loop were chosen with seed 0 on the "
        "validation part; however, when three of these were chosen, test numbers of "
        "seed 0 had been seen too: the strong view for labeled images, the "
        "learning-rate schedule, and scale jitter; and pasting was made the default "
        "after test numbers of supervised training had been seen with it, seeds 0 "
        "to 2, and one of `full` (docs/log.md). Rows with one run are marked by it.",
        rows=LADDER,
        seeds=(0, 1, 2),
        common=LONGER,
        once=("full, adaptive filter", "all labels"),
    ),
    "signs": Study(
        title="Generality: the second built-in dataset, 5 % labeled",
        text="Other classes, sizes and textures (`ssis/datasets/signs.py`), on which "
        "no setting was chosen: they are those of the shapes, and so is the "
        "tiny SAM. The short side is drawn from 84 to 112 pixels; labeled instances "
        "are pasted in all rows but the last three. (Test numbers with pasting had "
        "been seen, here and on the shapes, when it became the default.)",
        rows={
            "supervised": "--method supervised",
            "guided-distillation": GD,
            "full": "--method full",
            "supervised, no pasting": "--method supervised --arp none",
            "full, no pasting of labels": "--method full --arp unlabeled",
            "all labels, no pasting": "--method supervised --labeled 100% --arp none",
        },
        seeds=(0, 1),
        common=f"--preset signs {LONGER}",
    ),
    "animals": Study(
        title="Photographs: animals of 6 classes, 38 of 378 images labeled",
        text="Photographs of COCO and Open Images, 160 pixels, EfficientNet-Lite0 with "
        "ImageNet weights. Seeds 3 and 4 chose the rule that a weight above one half "
        "must pass a test (ssis Eq. (overrule)); by then test numbers of `full` with "
        "one half at most had been seen (docs/log.md). `full, tiny SAM` has the SAM "
        "that was trained on drawings; the gate that is measured takes none of its "
        "masks." + PHOTO_TEXT,
        rows=PHOTO_ROWS | {"full, tiny SAM": "--method full --sam tiny"},
        seeds=(0, 1, 2),
        common=f"{PHOTOS} --labeled 38",
        data=True,
        once=(*PHOTO_ONCE, "full, tiny SAM"),
        judged=True,
    ),
    "wbc": Study(
        title="Blood cells of 4 classes, 20 of 180 images labeled",
        text="White blood cells under the microscope, one in each image, with the same "
        "preset. That class shares are aligned was chosen with seeds 5 and 6 on "
        "unlabeled training images; the test AP of seeds 0 to 2 without it had been "
        "seen (docs/log.md). The rows `supervised` and `full`, and Guided "
        "Distillation with seed 0, are of 2026-11-27, before weights of the correction "
        "above one half were allowed by a test; the others are newer." + PHOTO_TEXT,
        rows=PHOTO_ROWS,
        seeds=(0, 1, 2),
        common=f"{PHOTOS} --labeled 20",
        data=True,
        once=PHOTO_ONCE,
        judged=True,
    ),
    "nuclei": Study(
        title="Cell nuclei: real images of one class, 20 of 200 labeled",
        text="Microscope images of the 2018 Data Science Bowl (CC0), at 256 pixels. Of "
        "the 240 training images 40 are kept for validation, and the published "
        "validation part is the test part: `python -m ssis prepare own --json "
        "nuclei/instances_train.json --root nuclei/train --out FOLDER --val 40`, and "
        "that part copied to `FOLDER/instances_test.json` and `FOLDER/test`. `full` is "
        "PL-DC with measured thresholds; it is without category correction, since "
        "there is one class, without SAM, of which no official weights could be had, "
        "and without copy-paste, which made first teachers worse on the validation "
        "images (test numbers of two runs with it had been seen, docs/log.md). Guided "
        "Distillation's threshold and the weight of unlabeled images were chosen with "
        "seed 3 (docs/log.md). Rows with one run are marked by it.",
        rows={
            "supervised": "--method supervised",
            "guided-distillation": f"{GD} --tau-class 0.5",
            "full": "--method full --filter calibrated --correction none "
            "--refine none --no-refine-calibrate --arp none",
            "supervised, copy-paste": "--method supervised --arp labeled",
            "all labels": "--method supervised --labeled 100%",
        },
        seeds=(0, 1, 2),
        common=f"{NUCLEI} --labeled 10%",
        data=True,
        once=("supervised, copy-paste", "all labels"),
        judged=True,
    ),
    "labels": Study(
        title="How many labels: built-in shapes, 2.5 to 20 %",
        text="The curve that every paper on the subject draws, without scale jitter. "
        "The rows `full` were "
        "made on 2026-11-30, with thresholds measured on the 128 validation images."
        + BEFORE.replace("Made", "The others were made"),
        rows={
            f"{share} {name}": f"{flags} --labeled {share}"
            for share in ("2.5%", "5%", "10%", "20%")
            for name, flags in {
                "supervised": "--method supervised",
                "guided-distillation": GD,
                "full, adaptive filter": FULL_BEFORE,
                "full": "--method full --arp unlabeled",
            }.items()
            # Measured thresholds at both ends and in the middle.
            if (share, name) != ("10%", "full")
        },
        seeds=(0, 1),
        common=ONE_SIZE,
    ),
    "without": Study(
        title="Each paper without each of its parts",
        text="What is lost when one part is switched off, without scale "
        "jitter. One seed: two runs of the same settings differ by up to 2 AP, so "
        "smaller differences say nothing." + BEFORE,
        rows={
            "pl-dc": "--method pl-dc",
            "pl-dc, filter by class score": "--method pl-dc --filter score",
            "pl-dc, no correction": "--method pl-dc --correction none",
            "pl-dc, no uncertainty": "--method pl-dc --no-uncertainty",
            "s4m": S4M_BEFORE,
            "s4m, no distillation": f"{S4M_BEFORE} --structure-weight 0",
            "s4m, no refinement": f"{S4M_BEFORE} --refine none",
            "s4m, no copy-paste": f"{S4M_BEFORE} --arp none",
            "s4m, no gate": "--method s4m --arp unlabeled --refine agreement",
        },
        seeds=(0,),
        common=ONE_SIZE,
    ),
    "amp": Study(
        title="Mixed precision: bf16 on a CPU",
        text="`full` with PL-DC's adaptive filter and without scale jitter, once more "
        "with `--amp bf16`, to be read with what two runs of the same settings differ "
        "by: up to 2 AP." + BEFORE,
        rows={
            "full, float32": FULL_BEFORE,
            "full, bf16": f"{FULL_BEFORE} --amp bf16",
        },
        seeds=(0, 1),
        common=ONE_SIZE,
    ),
    "ladder-one-size": Study(
        title="The ladder without scale jitter",
        text="As the built-in data were trained until 2026-11-30, with more parts "
        "alone and more oracles. Made before 2026-11-25, when the teacher's EMA "
        "changed (Guided Distillation then: 32.3): `supervised` and `all labels`, "
        "which have no teacher, the oracles, and, each alone, filter, uncertainty, "
        "distillation, refinement and copy-paste.",
        rows={
            "supervised": "--method supervised",
            "guided-distillation": GD,
            "+ adaptive filter": f"{GD} --filter adaptive",
            "+ category correction": f"{GD} --correction prototypes",
            "+ pixel uncertainty": f"{GD} --uncertainty",
            "pl-dc (all three)": "--method pl-dc",
            "+ structural distillation": f"{GD} --structure-weight 1",
            "+ refinement by SAM": f"{GD} --refine agreement",
            "+ copy-paste": f"{GD} --arp unlabeled",
            "s4m (as published)": "--method s4m --arp unlabeled",
            "pl-dc + s4m as published": f"{BOTH} --arp unlabeled",
            "full, adaptive filter": "--method full --arp unlabeled --filter adaptive",
            "full (both papers, own parts)": "--method full --arp unlabeled",
            "oracle: classes": f"{GD} --oracle class",
            "oracle: masks": f"{GD} --oracle mask",
            "oracle: both": f"{GD} --oracle both",
            "all labels": "--method supervised --labeled 100% --eval-every 800",
        },
        seeds=(0, 1, 2),
        common=ONE_SIZE,
    ),
    "signs-one-size": Study(
        title="The second built-in dataset without scale jitter",
        text="As it was trained until 2026-11-30. The row `full` was made then, with "
        "thresholds measured on the 128 validation images."
        + BEFORE.replace("Made", "The others were made"),
        rows={
            "supervised": "--method supervised",
            "guided-distillation": GD,
            "pl-dc": "--method pl-dc",
            "s4m": S4M_BEFORE,
            "full, adaptive filter": FULL_BEFORE,
            "full": "--method full --arp unlabeled",
            "all labels": "--method supervised --labeled 100%",
        },
        seeds=(0, 1),
        common=f"--preset signs {LONGER} --short-side-min 112 --arp none",
    ),
}


class Job(NamedTuple):
    """One run of a study: what it is called, and what train.py is told."""

    study: str
    row: str
    seed: int
    flags: tuple[str, ...]
    settings: config.Config
    folder: Path


# ----------------------------------------------------------------------- the results


def load(name: str) -> list[dict]:
    """The raw results of a study, in the order of its rows; none for a new one."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else []


def flags_of(study: Study, row: str) -> str:
    """The flags of train.py for a row, without the seed."""
    return f"{study.common} {study.rows[row]}".strip()


def current(name: str) -> list[dict]:
    """The raw results of a study that were made with the flags that it has now."""
    study = STUDIES[name]
    return [
        record
        for record in load(name)
        if record["row"] in study.rows
        and record["seed"] in study.seeds
        and record["flags"] == flags_of(study, record["row"])
    ]


def store(name: str, record: dict) -> None:
    """Write a raw result into its study's file; it replaces an older one of its row.

    The file is read again first, and replaced in one go: a kill, or another study
    running beside this one, loses nothing.
    """
    place = (record["row"], record["seed"])
    records = [r for r in load(name) if (r["row"], r["seed"]) != place] + [record]
    order = {row: k for k, row in enumerate(STUDIES[name].rows)}
    records.sort(key=lambda r: (order.get(r["row"], len(order)), r["seed"]))
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_text(RESULTS / f"{name}.json", json.dumps(records, indent=1) + "\n")


def comparable(settings: dict) -> dict:
    """Settings without what differs from machine to machine.

    Args:
        settings: of a run, by field. A field that came later, or is gone, has the
            value that its absence means (`config.completed`).

    Returns:
        Those that change the result; only the names of the dataset's folder, of SAM's
        weights and of the backbone's.
    """
    settings = config.completed(settings)
    ignored = config.not_in_result()
    kept = {k: v for k, v in settings.items() if k not in ignored}
    paths = ("data", "sam_checkpoint", "backbone_weights")
    return kept | {k: Path(settings[k]).name for k in paths}


def matches(job: Job, record: dict) -> bool:
    """Whether a raw result is that of this job: same settings, defaults included."""
    return comparable(asdict(job.settings)) == comparable(record["settings"])


def read_json(path: Path) -> dict | None:
    """A JSON of a run's folder; None if it is missing or incomplete."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())


def read_result(job: Job, machine: str) -> dict | None:
    """The raw result that a finished run left in its folder; None if there is none.

    Args:
        job: the run.
        machine: what it ran on, see `describe_machine`.
    """
    settings = read_json(job.folder / "config.json")
    summary = read_json(job.folder / "summary.json")
    if not settings or not summary or not matches(job, dict(settings=settings)):
        return None
    # The folder's name says which dataset; where it is differs between machines.
    source = Path(summary["evaluated_on"])
    summary["evaluated_on"] = f"{source.parent.name}/{source.name}"
    settings = comparable(settings)
    return relabel(job, dict(settings=settings, machine=machine, summary=summary))


def relabel(job: Job, record: dict) -> dict:
    """A raw result with the row, seed and flags that a job has in its study."""
    flags = flags_of(STUDIES[job.study], job.row)
    labels = dict(row=job.row, seed=job.seed, flags=flags)
    return labels | {k: v for k, v in record.items() if k not in labels}


def describe_machine(threads: int, processes: int) -> str:
    """The kind of machine, in words, for the tables."""
    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{kind}, {os.cpu_count()} CPU cores ({platform.machine()}), {threads} "
        f"thread(s) a run, {processes} run(s) side by side, PyTorch {torch.__version__}"
    )


# -------------------------------------------------------------------------- the jobs


def jobs(name: str, data: str = "") -> list[Job]:
    """All runs of a study.

    Raises:
        UserError: no folder of a dataset where one is needed, or one too many.
    """
    study, listed = STUDIES[name], []
    if study.data != bool(data):
        raise UserError(
            f"study {name}: "
            + (
                "--data FOLDER of its dataset is needed"
                if study.data
                else "draws its own dataset; leave --data out"
            )
        )
    for seed, row in study.runs:
        flags = [*flags_of(study, row).split(), "--seed", str(seed)]
        if data:
            flags += ["--data", data]
        settings = config.parse(flags)
        # "+ copy-paste" -> copy-paste-s0-4f1a2b: other settings, another folder.
        slug = re.sub(r"[^a-z0-9.]+", "-", row.lower()).strip("-")
        text = json.dumps(comparable(asdict(settings)), sort_keys=True)
        mark = hashlib.blake2b(text.encode(), digest_size=3).hexdigest()
        folder = RUNS / name / f"{slug}-s{seed}-{mark}"
        listed.append(Job(name, row, seed, tuple(flags), settings, folder))
    return listed


def same_pretraining(job: Job, settings: dict) -> bool:
    """Whether a run with these settings makes the first teacher that `job` needs."""
    # Supervised training is a single stage with a schedule of its own.
    if "supervised" in (job.settings.method, settings["method"]):
        return False
    if job.settings.structure_weight > 0:
        # The first teacher learned from SAM, so SAM's weights must be the same.
        paths = (job.settings.sam_checkpoint, settings.get("sam_checkpoint", ""))
        if len({Path(path).name for path in paths}) > 1:
            return False
    ignored = config.after_pretraining(job.settings)
    return not config.differences(job.settings, settings, ignored)


def first_teacher(job: Job) -> Path | None:
    """A `pretrained.pt` that this run can start from, of any study's run."""
    for path in sorted(RUNS.glob("*/*/pretrained.pt")):
        saved = read_json(path.with_name("config.json"))
        if saved and same_pretraining(job, saved):
            return path
    return None


def start(job: Job, threads: int) -> subprocess.Popen:
    """Run train.py, its output beside its folder."""
    command = [sys.executable, str(ROOT / "train.py"), *job.flags]
    command += ["--output", str(job.folder)]
    if not (job.folder / "checkpoint.pt").exists() and (teacher := first_teacher(job)):
        command += ["--pretrained", str(teacher)]
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(f"{job.folder}.log", "a") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment
        )


def next_job(waiting: list[Job], running: list[Job]) -> Job | None:
    """The first job that does not wait for a running one to make its first teacher."""
    for job in waiting:
        being_made = any(same_pretraining(job, asdict(r.settings)) for r in running)
        begun = (job.folder / "checkpoint.pt").exists()
        if begun or not being_made or first_teacher(job):
            return job
    return None


def run(name: str, processes: int, threads: int, data: str) -> bool:
    """Run what is missing of a study.

    Args:
        name: of the study.
        processes: runs side by side.
        threads: of each.
        data: folder of the dataset; empty: the preset's own.

    Returns:
        Whether all results are there now.
    """
    # A result of another study counts too: its settings are what identifies a run.
    known = [record for other in (name, *STUDIES) for record in load(other)]
    waiting, machine = [], describe_machine(threads, processes)
    for job in jobs(name, data):
        record = next((relabel(job, r) for r in known if matches(job, r)), None)
        record = record or read_result(job, machine)
        if not record:
            waiting.append(job)
        elif record not in load(name):
            store(name, record)

    total = len(STUDIES[name].runs)
    print(f"{name}: {total - len(waiting)} of {total} runs are there", flush=True)
    if waiting:
        print(
            f"{name}: {processes} at a time, their output in {RUNS / name}/*.log; stop "
            "with Ctrl-C, the same command goes on",
            flush=True,
        )
    running, complete = [], True
    try:
        while waiting or running:
            busy = [job for job, _ in running]
            while len(busy) < processes and (job := next_job(waiting, busy)):
                waiting.remove(job)
                busy.append(job)
                running.append((job, start(job, threads)))
            ended = [pair for pair in running if pair[1].poll() is not None]
            for job, process in ended:
                running.remove((job, process))
                record = read_result(job, machine) if process.returncode == 0 else None
                if record:
                    store(name, record)
                complete &= record is not None
                left, line = len(waiting) + len(running), describe(job, process, record)
                print(f"{name}: {line} ({left} to go)", flush=True)
            time.sleep(0.5)
    finally:
        # Stopped: each run saves its last step, and goes on from there the next time.
        for _, process in running:
            process.terminate()
        for _, process in running:
            process.wait()
    return complete


def describe(job: Job, process: subprocess.Popen, record: dict | None) -> str:
    """One line on a run that has ended: its AP, or the last line of its output."""
    if record:
        ap = record["summary"]["mask_ap"]
        who = "student" if ap["teacher"] is None else "teacher"
        return f"{job.row}, seed {job.seed}: {who}'s mask AP {ap[who]:.1f}"
    lines = Path(f"{job.folder}.log").read_text().strip().splitlines()
    last = lines[-1] if lines else "no output"
    return (
        f"{job.row}, seed {job.seed}: FAILED with status {process.returncode}: {last} "
        f"(all of it in {job.folder}.log)"
    )


# -------------------------------------------------------------------- the command line


def overview() -> str:
    """A line for each study: its name, how many results it has, its title.

    A dataset's folder is taken to have the name of its study.
    """
    lines = []
    for name, study in STUDIES.items():
        there, listed = load(name), jobs(name, name if study.data else "")
        done = sum(any(matches(job, record) for record in there) for job in listed)
        lines.append(f"{name:<15} {done:>3} of {len(listed):>3} runs   {study.title}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run the named studies, or list all of them."""
    parser = argparse.ArgumentParser(
        prog="python -m ssis study",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("names", nargs="*", help="studies to run; none: list them")
    parser.add_argument("--processes", type=int, default=1, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--data", default="", help="folder of the study's dataset")
    args = parser.parse_args(argv)
    # SIGTERM as Ctrl-C: the runs must be stopped too, or they would go on alone.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for name in args.names:
            if name not in STUDIES:
                there = ", ".join(STUDIES)
                raise UserError(f"study {name}: not there; there is {there}")
        if min(args.processes, args.threads) < 1:
            raise UserError("--processes, --threads: must be at least 1")
        complete = [
            run(name, args.processes, args.threads, args.data) for name in args.names
        ]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    if not args.names:
        print(overview())
        return
    made = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "scripts" / "make_results.py")]
    )
    if not made.returncode:
        print(f"tables and plots: {ROOT / 'docs' / 'results.md'}")
    sys.exit(not all(complete) or made.returncode)
