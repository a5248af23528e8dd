r"""What keeps a run alive: its folder, progress, signals, metrics, saving, evaluation.

`train.py` says what is learned; this file does the bookkeeping around it. One `Session`
is one call of `train.py`: it prepares data and folder, goes on where an earlier call
was stopped, hands out step numbers and batches, and does after each step what is due.

    with open_session(...) as session:
        session.restore(student=..., ...)
        for step in session.steps():
            ...                                  one step, on next(session.labeled) etc.
            session.after(step, ...)             log, warn, save, stop
            if session.evaluation_due: session.evaluate(...)
        session.finish(...)                      test, summary, pictures, report

Read next: `ssis/engine/resume.py`, what a checkpoint holds.
"""

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from ssis import UserError, copy_paste, data, distributed, losses, networks
from ssis.config import Config, flag
from ssis.datasets import parts, split
from ssis.engine import loader, resume, run_folder
from ssis.engine.signals import StopSignals
from ssis.io import checkpoint
from ssis.report import ap, audit, page, pictures, verdict


# So many validation images are looked at for a calibration; more would be exact to a
# fraction that does not matter.
CALIBRATION = 200


@contextlib.contextmanager
def open_session(config: Config, rank: int, world_size: int, device: torch.device):
    """A `Session`, whose folder is locked and whose workers are ended afterwards."""
    with contextlib.ExitStack() as held, loader.dead_workers():
        yield Session(config, rank, world_size, device, held)


class Session:
    """One call of `train.py`; every process has its own, and all make the same calls.

    Args:
        config: the settings.
        rank, world_size, device: of this process.
        held: closed when the session ends, whatever the reason.

    Attributes:
        train_set, val_set, test_set: the parts of the data.
        streams: `data.Streams`.
        class_frequency: (C,) fraction of each class among the labeled instances.
        annotated: (C,) instances of each class whose ground truth makes pseudo-labels.
        labeled, unlabeled: iterators over this process's batches, after `restore`.
        stopped: a signal has ended the run before its last step.
        evaluation_due: whether the step just made ends with an evaluation.
    """

    def __init__(self, config: Config, rank: int, world_size: int, device, held):
        self.config, self.rank, self.world_size = config, rank, world_size
        self.device, self.folder = device, config.run_folder
        self.pretrain_end, self.burnin_end, self.total = config.stage_ends
        distributed.from_main(check_batches, config, world_size)
        if config.deterministic:
            # Without it a GPU's matrix products vary; read at the first one.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(config.deterministic)
        # Rank 0 draws the shapes, checks the files and decides the split; the others
        # read what it wrote, so no two processes can disagree on what is labeled.
        distributed.from_main(parts.prepare, config)
        self.latest = distributed.from_main(run_folder.prepare, config, held)
        if rank == 0 and config.without_sam:
            print(
                "note: S4M's parts that need SAM are left out; to have them, give "
                "--sam vit_b --sam-checkpoint sam_vit_b_01ec64.pth "
                "(docs/sam.md)",
                file=sys.stderr,
            )
        if rank == 0 and (idle := config.idle_thresholds):
            print(
                f"note: {', '.join(idle)}: without effect, since --filter calibrated "
                "measures thresholds and gate; give another --filter to set them",
                file=sys.stderr,
            )
        self.train_set, self.val_set, self.test_set = parts.open_parts(config)
        path = self.folder / "labeled.json"
        labeled, unlabeled = split.split(self.train_set, config, path)
        self.counts = dict(
            labeled=len(labeled), unlabeled=len(unlabeled), steps=self.total
        )
        self.streams = data.make_streams(
            self.train_set,
            labeled,
            unlabeled,
            config.view_size,
            config.seed,
            config.oracle,
            config.repeat_threshold,
            # Not annotated may mean that nobody has looked.
            audited=config.labeled != "annotated",
        )
        self.detections = config.max_detections or self.detections_for(labeled)
        most, source = max(
            (part.most_instances(range(len(part))), part.source)
            for part in (self.val_set, self.test_set)
        )
        if rank == 0 and most > self.detections:
            print(
                f"note: an image of {source} has {most} instances, more than the "
                f"{self.detections} detections per image that are kept and counted; "
                f"--max-detections {most} keeps more",
                file=sys.stderr,
            )
        self.class_frequency = self.train_set.class_shares(labeled)
        counts = self.annotated = self.train_set.class_counts(labeled)
        for line in split.judging(self.val_set, counts):
            if rank == 0:
                print(f"warning: {line}", file=sys.stderr)
        if config.filter == "calibrated":
            # Their ground truth decides on the thresholds, too. A class that is not
            # taught is not asked for.
            more = self.val_set.class_counts(range(len(self.val_set)))
            self.annotated = counts + more * (counts > 0)
        self.per_image = self.train_set.instances_per_image(labeled)
        self.watch = audit.Watch(
            self.train_set.names, config.filter, self.per_image, self.class_frequency
        )
        self.done, self.results, self.earlier = 0, {}, 0.0
        self.began, self.table = time.monotonic(), {}
        self.stopped = self.evaluation_due = False
        # The first teacher's detections, if this call has made them; what best.pt is.
        self.first_found = self.chosen = None
        # Closed before an error is printed: it must not stand behind a progress bar.
        self.loop = held.enter_context(contextlib.ExitStack())

    def detections_for(self, labeled: list[int]) -> int:
        """How many instances are to be found in an image, with a line if it is unusual.

        torchvision's model gives 100 and COCO's evaluation counts 100: of a microscope
        image with 300 cells both would pass over two thirds without a word.
        """
        most = self.train_set.most_instances(labeled)
        if most <= ap.USUAL:
            return ap.USUAL
        # Half as many again: AP also counts what is found with little confidence.
        count = 100 * math.ceil(1.5 * most / 100)
        if self.rank == 0:
            print(
                f"note: a labeled image has {most} instances; up to {count} detections "
                "per image are kept and counted by AP, instead of COCO's 100 "
                "(--max-detections)",
                file=sys.stderr,
            )
        return count

    # ------------------------------------------------------------------ going on

    def restore(self, **state) -> None:
        """Where an earlier call was stopped, or `--pretrained`, if there is one.

        Args:
            state: what a checkpoint holds beside the session's own numbers; see
                `resume.snapshot`.
        """
        self.state, config = state, self.config
        if source := self.latest or config.pretrained:
            first_teacher = not self.latest
            saved = resume.restore(
                source, state, config, self.train_set.names, self.rank, first_teacher
            )
            self.done, self.results = saved["step"], saved["results"]
            self.earlier = saved["seconds"]
            # best.pt itself says which model it is.
            best = self.folder / "best.pt"
            if not first_teacher and best.exists():
                with contextlib.suppress(UserError):
                    self.chosen = checkpoint.load(best).get("chosen")
        # Now that the step is known: metrics and batches go on from there.
        path = self.folder / "metrics.jsonl"
        self.metrics = run_folder.Metrics(
            path, self.done, self.rank == 0, config.tensorboard
        )
        first = max(self.done, self.pretrain_end)
        self.labeled = self.labeled_batches()
        self.unlabeled = self.batches(
            self.streams.unlabeled, config.unlabeled_batch, first, self.total
        )
        self.began = time.monotonic()

    def batches(self, stream, batch: int, start: int, stop: int, ahead: int = 0):
        """This process's batches of a stream, from step `start` to before `stop`."""
        shard = data.Shard(batch, start, stop, self.rank, self.world_size, ahead)
        pin = self.device.type == "cuda"
        return loader.batches(stream, shard, self.config.workers, pin)

    def labeled_batches(self) -> Iterator[list[dict]]:
        """Batches of labeled images: of pretraining, then of what follows.

        S4M has another batch while the first teacher is made; GD and S4M draw rare
        classes more often after it. The second loader is opened when its turn comes:
        its workers would hold their first batches all the time.
        """
        config, end = self.config, self.pretrain_end
        batch = config.pretrain_batch or config.labeled_batch
        if self.done < end:
            yield from self.batches(self.streams.labeled, batch, self.done, end)
        # The items are numbered on, so that no view comes a second time.
        ahead = end * (batch - config.labeled_batch)
        batch, first = config.labeled_batch, max(self.done, end)
        yield from self.batches(self.streams.repeated, batch, first, self.total, ahead)

    def save(self, name: str) -> None:
        """Write a checkpoint into the run's folder; every process must call this."""
        state = resume.snapshot(
            self.state,
            self.config,
            self.train_set.names,
            self.done,
            self.results,
            self.seconds(),
        )
        distributed.from_main(checkpoint.save, self.folder / name, state)

    def seconds(self) -> float:
        """Time that the run has taken so far, all its calls together."""
        return self.earlier + time.monotonic() - self.began

    # --------------------------------------------------------------------- steps

    def stage(self, step: int) -> str:
        """The name of a step's stage."""
        if step < self.pretrain_end:
            return "pretrain"
        return "burn-in" if step < self.burnin_end else "mutual"

    def steps(self) -> Iterator[int]:
        """The steps that are to be made, behind a progress bar.

        Ctrl-C and SIGTERM (what a cluster sends before it kills) let the step under way
        end, and its checkpoint be written.
        """
        pause = 0.5 if sys.stderr.isatty() else 30
        size = dict(total=self.total, initial=self.done, dynamic_ncols=True)
        bar = tqdm(disable=self.rank != 0, mininterval=pause, **size)
        with self.loop:
            self.bar = self.loop.enter_context(bar)
            self.signals = self.loop.enter_context(StopSignals(self.device))
            for step in range(self.done, self.total):
                self.bar.set_description(self.stage(step), refresh=False)
                yield step
                if self.stopped:
                    return

    def after(self, step: int, row: dict, kept: list[Tensor], lr: float) -> None:
        """What is due after a step; every process must call this.

        Args:
            step: number of steps done before it.
            row: of the loss table.
            kept: the labels (N,) of the pseudo-labels of each unlabeled image.
            lr: the learning rate that it had.
        """
        config = self.config
        self.done = done = step + 1
        self.bar.update()
        self.watch.add(kept)
        # Summed over steps here, over processes when it is written.
        for name, value in row.items():
            self.table[name] = self.table.get(name, 0) + value
        stopping = self.signals.asked()
        saving = done % config.checkpoint_every == 0 or done == self.total or stopping
        evaluating = done % config.eval_every == 0 and done < self.total
        if done % 10 == 0 or saving or evaluating:
            means, self.table = losses.means(self.table), {}
            self.metrics.add(step=done, stage=self.stage(step), lr=lr, **means)
            self.bar.set_postfix(brief(means), refresh=False)
        if step >= self.pretrain_end:
            if done % audit.WATCH_EVERY == 0 or done == self.total:
                write = self.bar.write if self.rank == 0 else lambda line: None
                self.watch.report(write)
        if saving:
            self.save("checkpoint.pt")
        self.stopped = stopping and done < self.total
        if self.stopped and self.rank == 0:
            said = (
                f"stopped after step {done} of {self.total}; nothing is lost, the same "
                "command goes on"
            )
            if "TORCHELASTIC_RUN_ID" in os.environ:
                # It takes the signal for a crash.
                said += " (the traceback that follows is torchrun's own)"
            self.bar.write(said)
        self.evaluation_due = evaluating and not self.stopped

    # -------------------------------------------------------------- calibration

    def calibration_due(self, step: int) -> bool:
        """Whether the teacher is to be measured before a step."""
        regular = step % self.config.eval_every == 0
        due = regular or step in (self.pretrain_end, self.burnin_end)
        return self.config.filter == "calibrated" and due and step >= self.pretrain_end

    def validation_items(self) -> Iterator[dict]:
        """This process's validation images with their ground truth, a view of each."""
        everything = list(range(len(self.val_set)))
        seed = self.config.seed * 3 + 2
        stream = data.Stream(
            self.val_set, everything, self.config.view_size, seed, True
        )
        for k in range(self.rank, min(len(everything), CALIBRATION), self.world_size):
            yield stream[k]

    def calibrated(self, measured: dict) -> None:
        """Print what was measured, and keep it for the report."""
        measured = dict(step=self.done, **measured)
        self.results.setdefault("calibration", []).append(measured)
        if self.rank == 0:
            names, refined = self.train_set.names, self.config.refine != "none"
            self.bar.write(run_folder.calibration_line(measured, names, refined))

    # --------------------------------------------------------------- evaluation

    def test(self, name: str, net) -> list[dict]:
        """AP of a model on the test part, once; returns its detections."""
        if name == "pretrained":
            self.candidate(name, net)
            if name in self.results:
                return []
        self.results[name], detections = self.ap(net, self.test_set)
        if name == "pretrained":
            # For the verdict's interval, which large data do not get.
            count = len(self.test_set) * len(self.test_set.names)
            self.first_found = detections if count <= verdict.LARGE else []
        return detections

    def ap(self, net, dataset) -> tuple[dict, list[dict]]:
        """AP of a model on a part of the data, over all processes."""
        return ap.evaluate(net, dataset, self.device, self.rank, self.world_size)

    def candidate(self, who: str, net) -> float | None:
        """Validation AP of a model; the best one of the run so far is in best.pt.

        Args:
            who: "pretrained", "student" or "teacher".
            net: the model.
        """
        ap = self.ap(net, self.val_set)[0]["mask"]["AP"]
        # Of two equal ones the first teacher, or else the earlier.
        first, best, old = who == "pretrained", self.chosen, (-1, False)
        if best:
            old = (best["val_mask_ap"], best["who"] == "pretrained")
        if ap is not None and (ap, first) > old:
            self.chosen = dict(who=who, step=self.done, val_mask_ap=ap)
            state = resume.model_alone(
                net, self.config, self.train_set.names, self.done
            )
            # The file says itself what it is: the next checkpoint may come much later.
            state["chosen"] = self.chosen
            distributed.from_main(checkpoint.save, self.folder / "best.pt", state)
        return ap

    def audited(self) -> int:
        """How many unlabeled images an audit looks at, over all processes."""
        stream = self.streams.audit
        return min(self.config.audit_images, len(stream.indices)) if stream else 0

    def audit_items(self) -> Iterator[dict]:
        """This process's unlabeled images with their hidden ground truth."""
        for k in range(self.rank, self.audited(), self.world_size):
            yield self.streams.audit[k]

    def drawn_items(self) -> Iterator[dict]:
        """The unlabeled images that are drawn; none on all processes but the first."""
        stream = self.streams.audit or self.streams.unlabeled
        rows = min(pictures.ROWS, len(stream.indices)) if self.rank == 0 else 0
        for k in range(rows):
            yield stream[k]

    def audit(self, pairs) -> dict:
        """`audit.measure` of the stages of `audit_items`."""
        return audit.measure(
            pairs, self.train_set.names, self.per_image, self.audited(), self.device
        )

    def audit_burnin(self, pairs) -> None:
        """Audit the pseudo-labels at the end of the burn-in, for the summary."""
        self.results["burnin"] = self.audit(pairs)

    def evaluate(self, student, teacher, audited, drawn) -> None:
        """Validation AP, audit and pictures in the middle of a run.

        Args:
            student, teacher: the models; no teacher while pretraining.
            audited, drawn: (item, stages) of `audit_items` and of `drawn_items`.
        """
        line = {"val_mask_ap_student": self.candidate("student", student)}
        if teacher:
            line["val_mask_ap_teacher"] = self.candidate("teacher", teacher)
            line |= self.audit(audited)
            if self.rank == 0:
                path = self.folder / f"pseudo_{self.done:06d}.png"
                pictures.pseudo_labels(
                    list(drawn),
                    self.train_set.names,
                    path,
                    self.config.uncertainty,
                    self.paste(),
                )
        self.metrics.add(step=self.done, **line)

    def paste(self):
        """Copy-paste as this run has it, for its pictures, or None."""
        if self.config.arp not in ("unlabeled", "both"):
            return None
        return lambda images, targets, seed: copy_paste.arp(
            images, targets, **self.config.pasting(seed)
        )

    def finish(self, student, teacher, audited) -> None:
        """The end: test, verdict, summary, pictures, report; every process calls this.

        Args:
            student, teacher: the models; no teacher in supervised training.
            audited: (item, stages) of `audit_items`.
        """
        at_the_end = dict(student=self.candidate("student", student))
        detections = self.test("student", student)
        if teacher:
            at_the_end["teacher"] = self.candidate("teacher", teacher)
            detections = self.test("teacher", teacher)
            self.results |= self.audit(audited)
        self.test_best()
        others = self.others() if teacher else []
        summary = run_folder.summary(
            self.config, self.results, self.counts, self.test_set, self.seconds()
        )
        summary["val_mask_ap"], summary["best"] = at_the_end, self.chosen
        summary["test_is_validation"] = self.test_set.source == self.val_set.source
        if self.rank == 0:
            if teacher:
                now = (self.results["teacher"], detections)
                summary["verdict"] = verdict.verdict(
                    self.config, summary, now, others, self.test_set, self.detections
                )
            run_folder.write_summary(self.folder, summary)
            page.finish(self.folder, self.test_set, detections)
            print(run_folder.table(summary, self.folder))

    def test_best(self) -> None:
        """AP on the test part of the model that was best on the validation part."""
        chosen = self.chosen
        if chosen and (chosen["step"] == self.total or chosen["who"] == "pretrained"):
            self.results["best"] = self.results[chosen["who"]]
        elif chosen:
            self.test("best", self.load("best.pt"))

    def others(self) -> list[tuple]:
        """What the final teacher is compared with: name, numbers and detections."""
        found, numbers = self.first_found, self.results["pretrained"]
        if found is None and (self.folder / "pretrained.pt").exists():
            # It was tested in an earlier call of this run.
            numbers, found = self.ap(self.load("pretrained.pt"), self.test_set)
        others = [] if found is None else [(verdict.FIRST, numbers, found)]
        beside = distributed.from_main(
            verdict.supervised_beside, self.folder, self.total
        )
        net = None
        if beside:
            # What is wrong in another run's folder is no error of this one.
            with contextlib.suppress(UserError):
                net = self.load(beside)
        if net:
            numbers, found = self.ap(net, self.test_set)
            others.append(
                (
                    f"supervised training in {os.path.relpath(beside.parent)}",
                    numbers,
                    found,
                )
            )
        return others

    def load(self, path):
        """The student of a checkpoint; a name alone is one in the run's folder.

        Raises:
            UserError: it cannot be read, or is of other classes.
        """
        net, _, names, _ = resume.load_model(self.folder / path, "student")
        if names != self.train_set.names:
            raise UserError(
                f"{path}: is of other classes than {self.train_set.source}; give "
                "another --output"
            )
        # As many detections of each model that is compared here.
        networks.set_detections(net, self.detections)
        return net.to(self.device)


def check_batches(config: Config, world_size: int) -> None:
    """Raise UserError for batches that the processes cannot share, or paste within."""
    for name in ("pretrain_batch", "labeled_batch", "unlabeled_batch"):
        if getattr(config, name) % world_size:
            raise UserError(
                f"{flag(name)} {getattr(config, name)}: cannot be shared equally by "
                f"{world_size} processes; choose a multiple"
            )
    # A pair is made within a process: without a second image nothing would be pasted.
    semi = config.method != "supervised"
    parts = ["unlabeled"] if semi and config.arp in ("unlabeled", "both") else []
    if config.pastes_labeled:
        parts += ["pretrain"] if config.pretrain_batch else []
        parts += ["labeled"] if semi or not config.pretrain_batch else []
    for part in parts:
        batch = getattr(config, f"{part}_batch")
        if batch // world_size < 2:
            raise UserError(
                f"--arp {config.arp}: --{part}-batch {batch} over {world_size} "
                f"process(es) is {batch // world_size} image each, and copy-paste "
                "needs two; give a larger batch, fewer processes, or --arp none"
            )


def brief(means: dict[str, float]) -> dict[str, str]:
    """What the progress bar has room for."""
    result = {}
    for prefix in ("labeled", "unlabeled"):
        parts = [
            value for name, value in means.items() if name.startswith(prefix + "/")
        ]
        if parts:
            result[prefix] = f"{sum(parts):.2f}"
    if "pseudo_per_image" in means:
        result["pseudo/img"] = f"{means['pseudo_per_image']:.2f}"
    return result
