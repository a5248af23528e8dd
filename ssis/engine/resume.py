r"""What a checkpoint holds, and how a run goes on from it."""

import argparse
import dataclasses
from pathlib import Path

import torch

from ssis import UserError, config, distributed, model
from ssis.config import Config
from ssis.io.checkpoint import load, load_weights


def snapshot(run, names: list[str], step: int, results: dict, seconds: float) -> dict:
    """All that the next step depends on; every process must call this.

    Args:
        run: `run.Run`.
        names: class names, so that the checkpoint can be evaluated on its own.
        step: steps done, and so the position in the data streams.
        results: evaluations that cannot be repeated later.
        seconds: time spent so far.
    """
    gpu = torch.cuda.get_rng_state() if run.device.type == "cuda" else None
    return dict(
        config=dataclasses.asdict(run.config),
        names=names,
        step=step,
        results=results,
        seconds=seconds,
        student=run.net.state_dict(),
        # Before the burn-in there is no teacher: what is there was never trained.
        teacher=run.teacher.state_dict() if step > run.config.stage_ends[0] else None,
        # PL-DC: what its levels remember.
        thresholds=run.thresholds.state_dict(),
        second=run.second.state_dict() if run.second else {},
        # S4M: which SAM was asked.
        sam=run.embeddings.sam.fingerprint if run.embeddings else "",
        optimizer=run.optimizer.state_dict(),
        schedule=run.schedule.state_dict(),
        scaler=run.scaler.state_dict(),
        # torch's generators, from which anchors and proposals are sampled: one
        # state for each process.
        random=distributed.gather(dict(cpu=torch.get_rng_state(), gpu=gpu)),
    )


def restore(run, names: list[str], path: Path, first_teacher: bool = False) -> dict:
    """Put a snapshot back into a `run.Run`, and return it.

    Args:
        run: `run.Run`, new.
        names: class names.
        path: the checkpoint.
        first_teacher: it is that of another run at the end of the same pretraining
            (`--pretrained`), so that settings of what comes after may differ.

    Raises:
        UserError: it is of other settings or other classes.
    """
    state = load(path)
    if state["format"] == 1 and not first_teacher:
        raise UserError(
            f"{path}: is of an older version, whose teacher was averaged otherwise; "
            "evaluate.py reads it, but the run cannot go on; give another --output, or "
            "--resume never to replace it"
        )
    ignored = config.NOT_IN_RESULT
    if first_teacher:
        ignored = config.after_pretraining(run.config)
        if state["step"] != state["config"]["pretrain_steps"]:
            raise UserError(
                f"--pretrained {path}: was saved after step {state['step']}, not at "
                "the end of pretraining; give the pretrained.pt of that run"
            )
    distilled = run.config.structure_weight > 0
    other = config.differences(run.config, state["config"], ignored)
    # A checkpoint without the entry is older than SAM's part in this project.
    if run.embeddings and (distilled or not first_teacher) and "sam" in state:
        if state["sam"] != run.embeddings.sam.fingerprint:
            other.append("SAM's weights were others")
    if state["names"] != names:
        other.append(f"classes were {', '.join(state['names'][:4])}")
    if other:
        raise UserError(
            f"{path}: is of a run with other settings ({'; '.join(other[:3])}); "
            + (
                "give one of the same pretraining, or none"
                if first_teacher
                else "give another --output, or --resume never to replace it"
            )
        )
    load_weights(run.net, state["student"], path)
    if state["teacher"] is not None:
        load_weights(run.teacher, state["teacher"], path)
    if not first_teacher:
        # Of a first teacher they would be another method's; burn-in starts them.
        run.thresholds.load_state_dict(state["thresholds"])
        if run.second:
            run.second.load_state_dict(state["second"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.schedule.load_state_dict(state["schedule"])
    run.scaler.load_state_dict(state["scaler"])
    # With another number of processes there is no state for each; the run is then as
    # good as any other, only not the same bit for bit.
    if len(state["random"]) == run.world:
        mine = state["random"][run.rank]
        torch.set_rng_state(mine["cpu"])
        if mine["gpu"] is not None and run.device.type == "cuda":
            torch.cuda.set_rng_state(mine["gpu"])
    return state


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
    known = {field.name for field in dataclasses.fields(Config)}
    saved = {name: value for name, value in state["config"].items() if name in known}
    config = Config(**saved)
    # The weights are in the checkpoint: none are to be fetched.
    net = model.build(config, len(state["names"]) + 1, fetch=False)
    load_weights(net, state[who], path)
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
