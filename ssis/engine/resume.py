r"""What a checkpoint holds, and how a run goes on from it.

*Exactly*: it holds all that the next step depends on: student, teacher, optimizer,
schedule, loss scaler, what the pseudo-labels' levels remember, the step (from which the
data streams follow, see `ssis/data.py`) and the states of the random generators. On a
CPU a resumed run ends bit-identical, except for best.pt: an evaluation that a stop
interrupts is not repeated, so its models cannot become best.pt; nor, with
`--pretrained`, can models that the other run evaluated.

Read next: `ssis/io/checkpoint.py`, how it is written and read.
"""

import argparse
import dataclasses
from pathlib import Path

import torch

from ssis import UserError, distributed, model, networks
from ssis.config import (
    Config,
    after_pretraining,
    differences,
    from_saved,
    not_in_result,
)
from ssis.engine.build import model_of
from ssis.io.checkpoint import load, load_weights


def snapshot(
    state: dict,
    config: Config,
    names: list[str],
    step: int,
    results: dict,
    seconds: float,
) -> dict:
    """All that the next step depends on; every process must call this.

    Args:
        state: student, all of `build.Labeler`, optimizer, schedule, scaler.
        config: the settings of the run.
        names: class names, so that the checkpoint can be evaluated on its own.
        step: steps done, and so the location in the data streams.
        results: evaluations that cannot be repeated later.
        seconds: time spent so far.
    """
    on_gpu = next(state["student"].parameters()).is_cuda
    gpu = torch.cuda.get_rng_state() if on_gpu else None
    parts = {
        name: part.state_dict()
        for name, part in state.items()
        if "embeddings" not in name and part
    }
    # Before the burn-in there is no teacher: its network was never trained.
    if step <= config.stage_ends[0]:
        parts["teacher"] = None
    return dict(
        config=dataclasses.asdict(config),
        names=names,
        step=step,
        results=results,
        seconds=seconds,
        detections=state["student"].roi_heads.detections_per_img,
        # S4M: which SAM was asked.
        sam=state["embeddings"].sam.fingerprint if state["embeddings"] else "",
        # torch's generators, from which anchors and proposals are sampled: a state for
        # each process.
        random=distributed.gather(dict(cpu=torch.get_rng_state(), gpu=gpu)),
        **parts,
    )


def model_alone(net, config: Config, names: list[str], step: int) -> dict:
    """A checkpoint of a single model, to be used, not to go on from.

    Args:
        net: the model.
        config, names, step: as for `snapshot`.
    """
    state = dict(config=dataclasses.asdict(config), names=names, step=step)
    detections = net.roi_heads.detections_per_img
    return dict(state, detections=detections, student=net.state_dict(), teacher=None)


def restore(
    path: Path,
    state: dict,
    config: Config,
    names: list[str],
    rank: int,
    first_teacher: bool = False,
) -> dict:
    """Put a checkpoint back into the parts of a new run, and return it.

    Args:
        path: the checkpoint.
        state: as for `snapshot`; changed in place.
        config: the settings of the run.
        names: class names.
        rank: of this process.
        first_teacher: it is that of another run at the end of the same pretraining
            (`--pretrained`), so that settings of what comes after may differ.

    Raises:
        UserError: it is of other settings or other classes.
    """
    saved = load(path)
    check_same_run(path, saved, state, config, names, first_teacher)
    # PL-DC's memory in a first teacher's checkpoint would be another method's; the
    # burn-in starts it anew.
    own = ("thresholds", "classifier", "alignment", "calibration")
    for name in (*own, "optimizer", "schedule", "scaler"):
        older = name == "calibration" and name not in saved
        if state[name] and not older and not (first_teacher and name in own):
            state[name].load_state_dict(saved[name])
    if first_teacher:
        # It holds the rate of its own run's next step, which `lr_after` may change.
        schedule = state["schedule"]
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        pairs = zip(schedule.base_lrs, factors, strict=True)
        schedule._last_lr = [base * factor for base, factor in pairs]
        for group, lr in zip(
            state["optimizer"].param_groups, schedule._last_lr, strict=True
        ):
            group["lr"] = lr
    for name in ("student", "teacher"):
        if saved[name] is not None:
            load_weights(state[name], saved[name], path)
    # With another number of processes there is no state for each; the run is then as
    # good as any other, only not the same bit for bit.
    if len(saved["random"]) == distributed.world_size():
        mine = saved["random"][rank]
        torch.set_rng_state(mine["cpu"])
        if mine["gpu"] is not None and next(state["student"].parameters()).is_cuda:
            torch.cuda.set_rng_state(mine["gpu"])
    return saved


def check_same_run(
    path: Path,
    saved: dict,
    state: dict,
    config: Config,
    names: list[str],
    first_teacher: bool,
) -> None:
    """Raise UserError if a checkpoint is not of this run; arguments as `restore`."""
    if "random" not in saved:
        raise UserError(
            f"{path}: holds a model alone, without what a run needs to go on; "
            "give the pretrained.pt of its run"
        )
    if first_teacher and saved["step"] != from_saved(saved["config"]).stage_ends[0]:
        raise UserError(
            f"--pretrained {path}: was saved after step {saved['step']}, not at "
            "the end of pretraining; give the pretrained.pt of that run"
        )
    ignored = after_pretraining(config) if first_teacher else not_in_result()
    other = differences(config, saved["config"], ignored)
    # A first teacher that learned nothing from SAM can be of any.
    asked = state["embeddings"] and (config.structure_weight > 0 or not first_teacher)
    if asked and saved.get("sam") not in (None, state["embeddings"].sam.fingerprint):
        other.append("SAM's weights were others")
    if saved["names"] != names:
        other.append(f"classes were {', '.join(saved['names'][:4])}")
    if other:
        raise UserError(
            f"{path}: is of a run with other settings ({'; '.join(other[:3])}); "
            + (
                "give one of the same pretraining, or none"
                if first_teacher
                else "give another --output, or --resume never to replace it"
            )
        )


def load_model(path: Path, who: str) -> tuple[model.MaskRCNN, Config, list[str], str]:
    """A checkpoint's teacher or student, in evaluation mode.

    Args:
        path: the checkpoint.
        who: "teacher", "student", or "" for the teacher where there is one.

    Returns:
        The model, the run's config, the class names, and who it is.

    Raises:
        UserError: not a checkpoint, or one whose run has made no teacher yet.
    """
    state = load(path)
    # Until the end of pretraining, and in supervised runs, there is none.
    has_teacher = state["teacher"] is not None
    if who == "teacher" and not has_teacher:
        raise UserError(f"{path}: has no teacher (yet); use --who student")
    who = who or ("teacher" if has_teacher else "student")
    config = from_saved(state["config"])
    kind, *rest = model_of(config)
    # The weights are in the checkpoint: none are to be fetched.
    net = networks.build(kind, len(state["names"]) + 1, *rest, fetch=False)
    load_weights(net, state[who], path)
    # Older checkpoints are of runs in which it was always 100.
    networks.set_detections(net, state.get("detections", 100))
    return net.eval(), config, state["names"], who


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """What says which model."""
    parser.add_argument("checkpoint", type=Path, help="runs/<name>/checkpoint.pt")
    parser.add_argument(
        "--who",
        choices=("teacher", "student"),
        default="",
        help="default: the teacher, or the student of a run without one",
    )
