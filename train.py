r"""The whole training loop, readable from top to bottom.

    torchrun train.py                 S4M and PL-DC together, on the built-in dataset
    python train.py --help            every setting, with its reason

One run has three stages (Guided Distillation, arXiv 2308.02668, section 3):

    pretrain           the student learns from the labeled images alone; S4M: and from SAM
    guided burn-in     teacher := student, frozen; the student learns from both
    mutual learning    teacher := EMA of the student, in every step

B = images of this process's batch, N = instances, C = classes. Read next: `ssis/teacher.py`.
"""

import contextlib
import sys
import time

import torch
from torch import nn
from tqdm import tqdm

import evaluate
from ssis import UserError, augment, config, correction, distributed
from ssis.io import checkpoint
from ssis.report import audit
from ssis import filters, losses, model, refine, sam_distill
from ssis.datasets import split
from ssis.engine import loader, run_folder
from ssis.report import page
from ssis import teacher
from ssis.report import pictures
from ssis.engine.run import Run
from ssis.engine import resume
from ssis.datasets import parts
from ssis import data


# ---------------------------------------------------------------------------- one step


def step(run: Run, labeled: list[dict], unlabeled: list[dict] | None) -> dict:
    """One optimizer step.

    Args:
        run: the models and their optimizer.
        labeled: B items of `data.Stream`, with targets.
        unlabeled: B items without, or None while pretraining.

    Returns:
        The row of the loss table: name -> (2,) tensor [sum, count] of this process.
    """
    run.optimizer.zero_grad(set_to_none=True)
    run.guard.begin()
    # The unlabeled pass comes first and is freed by its own backward pass before the
    # labeled one starts: the memory of a step is that of its larger half, not of both.
    row = {} if unlabeled is None else unlabeled_pass(run, unlabeled)

    # The labeled images get the strong view too. Otherwise a gain over supervised training
    # would in part be that of the augmentation, which supervised training can have as well.
    images = [item["image"].to(run.device) for item in labeled]
    targets = [{k: v.to(run.device) for k, v in item["target"].items()} for item in labeled]
    if unlabeled is not None and run.config.arp == "both":
        images, targets = augment.arp(images, targets, run.config, labeled[0]["seed"])
    images = augment.strong_views(images, labeled)
    with run.autocast:
        loss_s, counts, features = run.student(images, targets)
    # GD Eq. (total): the labeled part. Its backward pass synchronizes the gradients
    # of both passes over the processes; every process always has labeled images.
    objective = losses.total(loss_s, counts, distributed.all_sum(counts), run.world)
    row |= losses.logged(loss_s, counts, "labeled/")
    if unlabeled is None and run.structure:
        # S4M Eq. (teacher), while pretraining: the teacher-to-be gets SAM's layout.
        loss_sd = sam_distill.loss(features, labeled, run.structure)
        objective = objective + run.config.structure_weight * loss_sd
        row["labeled/loss_structure"] = torch.stack([loss_sd.detach(), loss_sd.new_ones(())])
    run.scaler.scale(objective).backward()

    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.net.parameters(), run.config.clip_norm)
    # A step with NaN in it is not taken, and ends the run if it is the third in a row.
    if run.guard.allows(norm, row, labeled + (unlabeled or []), run.schedule.last_epoch + 1):
        run.scaler.step(run.optimizer)
    run.scaler.update()
    run.schedule.step()
    distributed.average_statistics(run.net)
    # PL-DC: the second classifier looks at the labeled images with the teacher's eyes.
    done = run.schedule.last_epoch
    if unlabeled is not None and run.second and done % correction.REFRESH_EVERY == 0:
        run.second.learn(run.teacher, labeled)
    return row


def unlabeled_pass(run: Run, unlabeled: list[dict]) -> dict:
    """Pseudo-labels for B unlabeled images, and the gradient of the loss on them."""
    settings = run.config
    # 1. The teacher labels the weak view; what it says is filtered and corrected.
    weak = [item["image"].to(run.device) for item in unlabeled]
    stages = pseudo_labels(run, weak, unlabeled)
    # PL-DC Eq. (adapt): the thresholds follow what the teacher predicts.
    run.thresholds.update(stages["predicted"])
    pseudo = stages.pop("final")
    run.watch.add(pseudo)
    del stages  # soft masks of every stage: at 1024 pixels gigabytes
    # 2. An image without a pseudo-label says nothing. It is left out, never trained as
    #    background: the teacher may just not have been sure.
    chosen = [i for i, found in enumerate(pseudo) if len(found)]
    # PL-DC Eq. (PMUA): with the certainty of each mask pixel, the teacher's or SAM's.
    targets = [pseudo[i].target(settings.uncertainty, settings.refine_calibrate) for i in chosen]
    images, items = [weak[i] for i in chosen], [unlabeled[i] for i in chosen]
    # 3. S4M: instances are pasted from image to image.
    if settings.arp != "none":
        images, targets = augment.arp(images, targets, settings, unlabeled[0]["seed"])
    # 4. The student must see the same in the strong view of the same pixels.
    strong = augment.strong_views(images, items)
    loss_u, counts = None, torch.zeros(losses.COUNTS, device=run.device)
    # `run.net`, not DDP's `run.student`: a process with no pseudo-label skips this pass, so
    # nothing in it may wait for the others. All take part in the sum of the counts.
    if chosen:
        with run.autocast:
            loss_u, counts, _ = run.net(strong, targets)
    total_counts = distributed.all_sum(counts)
    if chosen:
        objective = losses.total(loss_u, counts, total_counts, run.world)
        # GD Eq. (total): the unlabeled part, lambda_u L_unlabeled.
        run.scaler.scale(settings.unsup_weight * objective).backward()
    found = torch.tensor([sum(map(len, pseudo)), len(pseudo)], device=run.device)
    return losses.logged(loss_u, counts, "unlabeled/") | {"pseudo_per_image": found}


def pseudo_labels(run: Run, weak: list, items: list[dict], lowest: float | None = None) -> dict:
    """The teacher's pseudo-labels for B weak views, after each stage.

    Args:
        run: the models.
        weak: B images (3, H, W) float in [0, 1].
        items: what the stream gave for them; their truth is used by --oracle alone.
        lowest: also return predictions of this class score; None: what could pass.

    Returns:
        stage -> B `PseudoLabels`; the student is trained on the stage "final".
    """
    settings = run.config
    least = min(filters.lowest_score(settings), 1 if lowest is None else lowest)
    with run.autocast:
        predicted = teacher.predict(run.teacher, weak, least)
    # PL-DC, instance level: class and mask quality decide what is kept.
    latest = kept = [filters.keep(found, settings, run.thresholds) for found in predicted]
    stages = dict(predicted=predicted, kept=kept)
    # S4M: SAM, which sees the original image, redraws the masks.
    if settings.refine != "none":
        pairs = zip(kept, items, strict=True)
        latest = [refine.refine(found, run.embeddings, item, settings) for found, item in pairs]
        stages["refined"] = latest
    # PL-DC, category level: a second opinion on the class, which fades with time. It comes
    # after SAM: a better silhouette is easier to name.
    if settings.correction != "none":
        weight = correction.weight(run.schedule.last_epoch, *settings.stage_ends[1:])
        latest = stages["corrected"] = correction.correct(latest, weak, run.second, weight)
    # Headroom, not a method.
    if settings.oracle != "none":
        pairs = zip(latest, items, strict=True)
        stages["oracle"] = [audit.oracle(p, i["target"], settings.oracle) for p, i in pairs]
    return stages | {"final": list(stages.values())[-1]}


# ------------------------------------------------------------------- between the steps


def begin_burnin(run: Run, labeled: data.Stream, frequency: torch.Tensor) -> None:
    """GD: teacher := student, frozen; the student goes on, or starts afresh.

    PL-DC's second classifier learns from the stream `labeled`; its thresholds start from
    the `frequency` (C,) of the classes.
    """
    run.teacher.load_state_dict(run.net.state_dict())
    run.thresholds.start(frequency)
    correction.begin(run, labeled)
    if run.config.burnin_init == "fresh":
        model.start_afresh(run.net, run.config)
        run.optimizer.state.clear()


# ----------------------------------------------------------------------------- the run


def train(settings: config.Config, start: tuple, held: contextlib.ExitStack) -> None:
    """From the settings to `summary.json`; `start` is of `distributed.start`."""
    main_process, device, folder = start[0] == 0, start[2], settings.run_folder
    torch.use_deterministic_algorithms(settings.deterministic)

    # Data. Rank 0 draws the shapes, checks the files and decides the split; the others read
    # what it wrote, so no two processes can disagree on what is labeled.
    distributed.from_main(parts.prepare, settings)
    latest = distributed.from_main(run_folder.prepare, settings, held)
    train_set, val_set, test_set = parts.open_parts(settings)
    labeled, unlabeled = split.split(train_set, settings, folder / "labeled.json")
    streams = data.streams(train_set, labeled, unlabeled, settings)

    # Model: new, or as it was when the run was stopped.
    run = Run(settings, train_set, start)
    run.watch.expect(train_set.instances_per_image(labeled), train_set.class_shares(labeled))
    pretrain_end, burnin_end, total = settings.stage_ends
    done, results, earlier = 0, {}, 0.0
    if source := latest or settings.pretrained:
        state = resume.restore(run, train_set.names, source, first_teacher=not latest)
        done, results, earlier = state["step"], state["results"], state["seconds"]
    metrics = run_folder.Metrics(folder / "metrics.jsonl", done, main_process, settings.tensorboard)
    labeled_batches = loader.batches(streams.labeled, settings.labeled_batch, done, run)
    first = max(done, pretrain_end)
    unlabeled_batches = loader.batches(streams.unlabeled, settings.unlabeled_batch, first, run)
    began, table = time.monotonic(), {}

    def save(name: str) -> None:
        spent = earlier + time.monotonic() - began
        state = resume.snapshot(run, train_set.names, done, results, spent)
        distributed.from_main(checkpoint.save, folder / name, state)

    pause = 0.5 if sys.stderr.isatty() else 30
    size = dict(total=total, initial=done, dynamic_ncols=True, mininterval=pause)
    # `with`: an error must not be printed behind an open progress bar. Ctrl-C and SIGTERM
    # (what a cluster sends before it kills): finish the step, save, go.
    with tqdm(disable=not main_process, **size) as bar, distributed.StopSignals(device) as stop:
        for number in range(done, total):
            if number == pretrain_end:
                # The first teacher: judge it, keep it (for `--pretrained`), freeze it.
                if "pretrained" not in results:
                    results["pretrained"], _ = evaluate.judge(run, run.net, test_set)
                save("pretrained.pt")
                begin_burnin(run, streams.labeled, train_set.class_shares(labeled))
            if number == burnin_end:
                # While PL-DC's correction counts most; at the end it counts nothing.
                results["burnin"] = audit.run(run, pseudo_labels, streams.audit)
                # GD: teacher := student; from here on it follows, step by step.
                run.teacher.load_state_dict(run.net.state_dict())
                if settings.burnin_init == "fresh":
                    correction.begin(run, streams.labeled)  # it remembers another network
            semi, mutual = number >= pretrain_end, number >= burnin_end
            stage = "mutual" if mutual else "burn-in" if semi else "pretrain"
            bar.set_description(stage, refresh=False)
            lr = run.schedule.get_last_lr()[-1]
            row = step(run, next(labeled_batches), next(unlabeled_batches) if semi else None)
            if mutual:
                # GD Eq. (EMA)
                teacher.ema_update(run.teacher, run.net, settings.ema_decay)
            done = number + 1
            bar.update()
            # The loss table is summed over steps here, over processes when it is written.
            table |= {name: table.get(name, 0) + value for name, value in row.items()}
            stopping = stop.asked()
            saving = done % settings.checkpoint_every == 0 or done == total or stopping
            judging = done % settings.eval_every == 0 and done < total
            if done % 10 == 0 or saving or judging:
                # Raises on NaN, before anything is saved: such a checkpoint is worth nothing.
                means, table = losses.means(table, done), {}
                metrics.add(step=done, stage=stage, lr=lr, **means)
                bar.set_postfix(losses.brief(means), refresh=False)
            if semi and (done % audit.WATCH_EVERY == 0 or done == total):
                run.watch.report(bar.write)
            if saving:
                save("checkpoint.pt")
            if stopping and done < total:
                if main_process:
                    bar.write(f"stopped after step {done} of {total}; the same command goes on")
                return
            if judging:
                found, _ = evaluate.judge(run, run.net, val_set)
                line = {"val_mask_ap_student": found["mask"]["AP"]}
                if semi:
                    found, _ = evaluate.judge(run, run.teacher, val_set)
                    line["val_mask_ap_teacher"] = found["mask"]["AP"]
                    line |= audit.run(run, pseudo_labels, streams.audit)
                    pictures.pseudo_labels(run, pseudo_labels, streams, folder, done)
                metrics.add(step=done, **line)

    # The end: the student and, where there is one, the teacher, on the test part.
    results["student"], found = evaluate.judge(run, run.net, test_set)
    if total > pretrain_end:
        results["teacher"], found = evaluate.judge(run, run.teacher, test_set)
        results |= audit.run(run, pseudo_labels, streams.audit)
    spent = earlier + time.monotonic() - began
    counts = dict(labeled=len(labeled), unlabeled=len(unlabeled), steps=total)
    summary = run_folder.summary(settings, results, counts, test_set, spent)
    if main_process:
        run_folder.write_summary(folder, summary)
        page.finish(folder, test_set, found)
        print(run_folder.table(summary, folder))


# -------------------------------------------------------------------- the command line


def main(argv: list[str] | None = None) -> None:
    """One line and status 2 for what the user did wrong, a traceback for what we did."""
    try:
        settings = config.parse(argv)
        with contextlib.ExitStack() as held, loader.dead_workers():
            train(settings, distributed.start(settings.device), held)
        distributed.stop()
    except UserError as error:
        distributed.give_up(error)
    except KeyboardInterrupt:  # during data preparation or the last evaluation
        print("stopped; what was saved stays, the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
