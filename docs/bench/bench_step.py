r"""What a step costs: against plain torchvision, and its peak memory against its halves.

    python docs/bench/bench_step.py time      supervised step / the same step on plain torchvision
    python docs/bench/bench_step.py memory    semi-supervised step / its larger half
    python docs/bench/bench_step.py levels --pretrained runs/<name>/pretrained.pt
                                        the papers' steps / Guided Distillation's, SAM's share,
                                        and all of them / the floor: torchvision's teacher
                                        predicting, then one training step on the same images

Time: both sides have the same weights, images, targets, optimizer and threads; their
steps take turns, so that a machine that slows down slows down both. The ratio is that of
the medians. Memory: each variant in a process of its own, since peak memory never falls.
"""

import argparse
import dataclasses
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn
from torchvision.models.detection.mask_rcnn import MaskRCNN as TorchvisionMaskRCNN

import train
from ssis import augment, calibration, config, correction, data, model, networks, refine, teacher
from ssis.datasets import parts, split
from ssis.engine import resume
from ssis.engine.build import build, model_of
from ssis.engine.guard import Guard
from ssis.io import checkpoint
from ssis.presets import METHODS, switches


class Run:
    """What `train.train` has in its hands: the parts of a run, and how many steps were made."""

    def __init__(self, made: config.Config, train_set, step: int = 0, val_set=None):
        self.config, self.step = made, step
        of_run = build(made, train_set, 0, 1, torch.device("cpu"), val_set=val_set)
        self.net, self.labeler, self.structure, self.optimizer, self.schedule, self.scaler = of_run
        self.guard = Guard(self.net, train_set.files, made.run_folder, False, 0)

    def make_step(self, labeled: list[dict], unlabeled: list[dict] | None) -> None:
        """One step of `train.train`, without the EMA."""
        train.train_step(
            self.net, self.labeler, labeled, unlabeled, self.step, self.config,
            self.structure, self.optimizer, self.schedule, self.scaler, self.guard,
        )  # fmt: skip
        self.step += 1

    def begin_burnin(self, pretrained: str, names: list[str], labeled, frequency) -> None:
        """From a first teacher on, as in `train.train`."""
        teacher, thresholds, classifier, *_ = self.labeler
        learning = dict(optimizer=self.optimizer, schedule=self.schedule, scaler=self.scaler)
        state = dict(student=self.net, **self.labeler._asdict(), **learning)
        self.step = resume.restore(Path(pretrained), state, self.config, names, 0, True)["step"]
        teacher.load_state_dict(self.net.state_dict())
        thresholds.start(frequency)
        correction.fill(classifier, teacher, labeled, 0, 1)


# Guided Distillation, supervised or not: what the two sides of `time` have in common.
PLAIN = METHODS["guided-distillation"]


def setup(**settings) -> tuple[Run, list, list]:
    """Guided Distillation on the built-in dataset with a threshold of 0.2, and batches of it."""
    # One size, so that all steps have the same work.
    usual = {**PLAIN, "tau_class": 0.2, "short_side_min": 96}
    made = config.Config(device="cpu", **{**usual, **settings})
    parts.prepare(made)
    train_set, _, _ = parts.open_parts(made)
    labeled, unlabeled = list(range(64)), list(range(64, 1280))
    streams = data.make_streams(train_set, labeled, unlabeled, made.view_size, made.seed, "none")
    run = Run(made, train_set)
    size = made.labeled_batch
    batches = [
        [[stream[size * k + i] for i in range(size)] for k in range(4)]
        for stream in (streams.labeled, streams.unlabeled)
    ]
    return run, *batches


def plain_net(run: Run) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A copy of the student with torchvision's own losses and samplers, and AdamW."""
    kind, *rest = model_of(run.config)
    net = networks.build(kind, len(run.net.roi_heads.box_predictor.cls_score.bias), *rest).train()
    net.load_state_dict(run.net.state_dict())
    net.rpn.__class__, net.roi_heads.__class__ = model.RegionProposalNetwork, model.RoIHeads
    for part in (net.rpn, net.roi_heads):
        ours = part.fg_bg_sampler
        part.fg_bg_sampler = model.BalancedPositiveNegativeSampler(
            ours.batch_size_per_image, ours.positive_fraction
        )
    return net, torch.optim.AdamW(net.parameters(), lr=run.config.lr)


def plain_step(net, optimizer, batch: list[dict], clip_norm: float) -> None:
    """A training step as torchvision's tutorial writes it, on the same views."""
    images = [augment.strong_view(item["image"], item["seed"]) for item in batch]
    targets = [item["target"] for item in batch]
    losses = TorchvisionMaskRCNN.forward(net, images, targets)
    total = sum(losses.values())
    optimizer.zero_grad()
    total.backward()
    nn.utils.clip_grad_norm_(net.parameters(), clip_norm)
    optimizer.step()


def measure_time(steps: int) -> None:
    """Alternate the two kinds of step and print the ratio of their medians."""
    run, labeled, _ = setup()
    net, optimizer = plain_net(run)
    times: dict[str, list[float]] = {"ssis": [], "torchvision": []}
    for k in range(steps + 3):
        for side in times:
            torch.manual_seed(k)
            began = time.perf_counter()
            if side == "ssis":
                run.make_step(labeled[k % 4], None)
            else:
                plain_step(net, optimizer, labeled[k % 4], run.config.clip_norm)
            times[side].append(time.perf_counter() - began)
    # The first three of each warm up.
    medians = {side: statistics.median(values[3:]) for side, values in times.items()}
    for side, value in medians.items():
        print(f"{side:12} {1000 * value:7.1f} ms per supervised step of 8 images")
    print(
        f"ratio        {medians['ssis'] / medians['torchvision']:7.3f}  "
        f"({torch.get_num_threads()} threads, {steps} steps each)"
    )


def measure_levels(pretrained: str, steps: int) -> None:
    """Alternate the steps of four methods that start from the same first teacher.

    The ratios are those of the sums: every tenth step of PL-DC refreshes its prototypes.
    SAM's embeddings are there beforehand, as after a run's first pass over the images.
    """
    saved = checkpoint.load(pretrained)["config"]
    runs, times, in_sam = {}, {}, {}
    for method in ("guided-distillation", "pl-dc", "s4m", "full"):
        # The parts as the method has them, whatever the run had: no oracle, the default gate.
        # The first teacher is the same for all: what came before it costs nothing here.
        usual = {f.name: f.default for f in dataclasses.fields(config.Config) if f.metadata["part"]}
        own = usual | switches(saved["preset"], method, saved["model"])
        own["structure_weight"] = saved.get("structure_weight", 0.0)
        made = config.from_saved({**saved, "method": method, **own})
        train_set, val_set, _ = parts.open_parts(made)
        # The split of the run itself, which lies beside the checkpoint.
        beside = str(Path(pretrained).parent / "labeled.json")
        labeled, _ = split.draw_split(train_set, beside, made.seed)
        rest = sorted(set(range(len(train_set))) - set(labeled))
        size, seed = made.view_size, made.seed
        streams = data.make_streams(train_set, labeled, rest, size, seed, "none")
        run = Run(made, train_set, val_set=val_set)
        frequency = train_set.class_shares(labeled)
        run.begin_burnin(pretrained, train_set.names, streams.labeled, frequency)
        if made.filter == "calibrated":
            # As a run does where it is evaluated.
            images = data.Stream(val_set, list(range(len(val_set))), size, seed, True)
            began = time.perf_counter()
            looked = calibration.look(run.labeler, (images[k] for k in range(len(val_set))), made)
            calibration.calibrate(run.labeler, *looked)
            took = time.perf_counter() - began
            print(f"{method}: calibration on {len(val_set)} images: {took:.1f} s")
        runs[method], times[method], in_sam[method] = run, [], []
    # The floor has the images and the kept pseudo-labels of Guided Distillation.
    simple = runs["guided-distillation"]
    net, optimizer = plain_net(simple)
    times["floor"], in_sam["floor"] = [], [0.0] * (steps + 2)
    redraw = refine.refine
    spent = [0.0]

    def timed(*arguments):
        began = time.perf_counter()
        result = redraw(*arguments)
        spent[0] += time.perf_counter() - began
        return result

    refine.refine = timed
    for k in range(steps + 2):
        batches = [
            [stream[8 * k + i] for i in range(8)] for stream in (streams.labeled, streams.unlabeled)
        ]
        for method, run in runs.items():
            if run.labeler.embeddings:
                for item in batches[1]:
                    run.labeler.embeddings[item["index"]]
            torch.manual_seed(k)
            spent[0], began = 0.0, time.perf_counter()
            run.make_step(*batches)
            times[method].append(time.perf_counter() - began)
            in_sam[method].append(spent[0])
        weak = [item["image"] for item in batches[1]]
        arguments = (simple.labeler, weak, batches[1], simple.config, simple.step)
        pseudo = train.pseudo_labels(*arguments)["final"]
        taught = [
            dict(item, target=labels.target())
            for item, labels in zip(batches[1], pseudo, strict=True)
            if len(labels)
        ]
        torch.manual_seed(k)
        began = time.perf_counter()
        # No mask of what no method would keep.
        looking = simple.labeler.teacher
        usual = looking.roi_heads.score_thresh
        looking.roi_heads.score_thresh = simple.config.tau_class
        with torch.no_grad():
            TorchvisionMaskRCNN.forward(looking, weak)
        looking.roi_heads.score_thresh = usual
        plain_step(net, optimizer, batches[0] + taught, simple.config.clip_norm)
        times["floor"].append(time.perf_counter() - began)
    means = {method: statistics.mean(values[2:]) for method, values in times.items()}
    for method, value in means.items():
        fraction = statistics.mean(in_sam[method][2:]) / value
        print(
            f"{method:20} {1000 * value:7.1f} ms per step of 8 + 8 images, "
            f"ratio {value / means['guided-distillation']:.3f}, to the floor "
            f"{value / means['floor']:.3f}, SAM {100 * fraction:4.1f} %"
        )
    print(f"({torch.get_num_threads()} threads, {steps} steps each)")


def one_variant(variant: str) -> None:
    """Run some steps of one variant and print the growth of the peak memory, MiB."""
    # Images of 320 pixels: activations, not weights, make the peak.
    run, labeled, unlabeled = setup(short_side_min=320, short_side=320, long_side=320)
    # An untrained teacher is sure of nothing; this makes it find something everywhere.
    run.config.tau_class = 0.16
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for k in range(3):
        if variant == "labeled half":
            run.make_step(labeled[k], None)
        elif variant == "unlabeled half":
            train.unlabeled_pass(
                run.net, run.labeler, unlabeled[k], run.step, run.config, run.scaler
            )
            run.optimizer.step()
        elif variant == "whole step":
            run.make_step(labeled[k], unlabeled[k])
        else:
            one_graph_step(run, labeled[k], unlabeled[k])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print((peak - start) // 1024)


def one_graph_step(run: Run, labeled: list[dict], unlabeled: list[dict]) -> None:
    """The step as it must not be: both losses in one graph, one backward pass."""
    weak = [item["image"] for item in unlabeled]
    kept = teacher.predict(run.labeler.teacher, weak, run.config.tau_class)
    images = [image for image, pseudo in zip(weak, kept, strict=True) if len(pseudo)]
    targets = [pseudo.target() for pseudo in kept if len(pseudo)]
    loss_u, *_ = run.net(images, targets)
    del kept
    loss_s, *_ = run.net([item["image"] for item in labeled], [item["target"] for item in labeled])
    (sum(loss_u.values()) + sum(loss_s.values())).backward()
    run.optimizer.step()


def measure_memory() -> None:
    """Each variant in its own process; print the table and the ratio."""
    peaks = {}
    for variant in ("labeled half", "unlabeled half", "whole step", "one graph"):
        done = subprocess.run(
            [sys.executable, __file__, variant], capture_output=True, text=True, check=True
        )
        peaks[variant] = int(done.stdout.split()[-1])
        print(f"{variant:16} {peaks[variant]:6} MiB over the start")
    half = max(peaks["labeled half"], peaks["unlabeled half"])
    print(
        f"whole step / larger half {peaks['whole step'] / half:.2f}, "
        f"one graph / larger half {peaks['one graph'] / half:.2f}"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", help="time, levels, memory (or one variant of memory)")
    parser.add_argument("--pretrained", help="first teacher, for levels")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    if args.what == "time":
        measure_time(args.steps)
    elif args.what == "memory":
        measure_memory()
    elif args.what == "levels":
        if not args.pretrained:
            parser.error("levels needs --pretrained")
        measure_levels(args.pretrained, args.steps)
    else:
        one_variant(args.what)


if __name__ == "__main__":
    main()
