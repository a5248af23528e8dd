r"""The whole training loop, readable from top to bottom.

    torchrun train.py                 S4M and PL-DC together, on the built-in dataset
    python train.py --help            every setting, with its reason

One run has three stages (Guided Distillation, arXiv 2308.02668, section 3):

    pretrain           the student learns from the labeled images alone; S4M: and from SAM
    guided burn-in     teacher := student, frozen; the student learns from both
    mutual learning    teacher := student once more, then its EMA in every step

The file has the order of a newspaper: a run (`train`), a step (`train_step`), pseudo-labels
(`pseudo_labels`). `ssis/engine/build.py` makes the parts; `ssis/engine/session.py` keeps it alive.

B = images in this process's batch, N = instances, C = classes.

Chain: 1 of 24. Read next: `ssis/data.py`, where the batches come from.
"""

import torch
from torch import Tensor, nn

from ssis import augment, calibration, copy_paste, correction, data, distributed, filters
from ssis import losses, model, networks, refine, sam_distill
from ssis.config import Config, parse
from ssis.engine.build import Labeler, build, model_of
from ssis.engine.guard import Guard
from ssis.engine.session import open_session
from ssis.io import program
from ssis.report import audit
from ssis.teacher import ema_update, predict


def train(config: Config) -> None:
    """One run, from the settings to `summary.json`; a run that was stopped goes on."""
    rank, world_size, device = distributed.start(config.device, config.amp)
    pretrain_end, burnin_end, total = config.stage_ends
    with open_session(config, rank, world_size, device) as session:
        parts = (session.train_set, rank, world_size, device, session.val_set)
        made = build(config, *parts, session.detections, session.annotated)
        student, labeler, structure, optimizer, schedule, scaler = made
        teacher, thresholds, classifier, *_ = labeler
        # The student without DDP's wrapper: for the teacher, which follows it, and to look at.
        net = distributed.unwrap(student)
        guard = Guard(net, session.train_set.files, config.run_folder, config.amp == "fp16", rank)
        # All that the next step depends on. If an earlier call was stopped, it is as it was then.
        learning = dict(optimizer=optimizer, schedule=schedule, scaler=scaler)
        session.restore(student=net, **labeler._asdict(), **learning)
        filling = (classifier, teacher, session.streams.labeled, rank, world_size)

        def stages(items: list[dict], step: int):
            """Pseudo-labels of single images, one after the other, to be audited or drawn."""
            for item in items:
                weak = [item["image"].to(device)]
                yield item, pseudo_labels(labeler, weak, [item], config, step, audit.PREDICTED)

        for step in session.steps():
            if step == pretrain_end:
                # The first teacher is ready: measure it, and keep it for `--pretrained`.
                session.test("pretrained", net)
                session.save("pretrained.pt")
                # GD: teacher := student, frozen during the burn-in.
                teacher.load_state_dict(net.state_dict())
                # PL-DC: thresholds start from the class frequencies, the memory is filled.
                thresholds.start(session.class_frequency)
                correction.fill(*filling)
                if config.burnin_init == "fresh":
                    # GD: a new student, not biased towards its own teacher; AdamW forgets.
                    networks.start_afresh(net, config.seed, *model_of(config))
                    optimizer.state.clear()
            if step == burnin_end:
                # PL-DC's correction has weight 0.5 until here, 0 at the end (ours: measured).
                if config.burnin_steps:
                    session.audit_burnin(stages(session.audit_items(), step))
                # GD: teacher := student; the student has caught up with its frozen teacher.
                teacher.load_state_dict(net.state_dict())
                if config.burnin_init == "fresh":
                    # Features of two networks cannot be compared: the memory starts anew.
                    correction.fill(*filling)

            if session.calibration_due(step):
                # Ours: known ground truth decides what is kept, redrawn and corrected.
                looked = calibration.look(labeler, session.validation_items(), config)
                session.calibrated(calibration.calibrate(labeler, *looked))
            # One step, on labeled images alone while the first teacher is made, then on both.
            lr = schedule.get_last_lr()[-1]
            unlabeled = next(session.unlabeled) if step >= pretrain_end else None
            row, kept = train_step(
                student, labeler, next(session.labeled), unlabeled, step, config,
                structure, optimizer, schedule, scaler, guard,
            )  # fmt: skip
            if step >= burnin_end:
                # GD Eq. (EMA): the teacher is an average over many steps, smoother than any
                # single student, and mistakes must persist to get into it.
                ema_update(teacher, net, config.ema_decay)

            # Log, warn, save and stop, where due; a checkpoint holds all of this step, or none.
            session.after(step, row, kept, lr)
            if session.evaluation_due:
                who = (net, teacher if step >= pretrain_end else None)  # the teacher, once there
                items = (session.audit_items(), session.drawn_items())
                session.evaluate(*who, *(stages(some, step + 1) for some in items))
        if not session.stopped:
            # The table: AP of first teacher, student and teacher; pseudo-labels of the last step.
            who = (net, teacher if total > pretrain_end else None)
            session.finish(*who, stages(session.audit_items(), total - 1))
    distributed.stop()


# ---------------------------------------------------------------------------- one step


def train_step(
    student: nn.Module, labeler: Labeler, labeled: list[dict], unlabeled: list[dict] | None,
    step: int, config: Config, structure, optimizer, schedule, scaler, guard: Guard,
) -> tuple[dict, list[Tensor]]:  # fmt: skip
    """One optimizer step: unlabeled pass, labeled pass, clip, step.

    Args:
        student: wrapped by DDP where there are several processes.
        labeler: makes the pseudo-labels.
        labeled: B items of `data.Stream`, with targets.
        unlabeled: B items without, or None while pretraining.
        step: t, the number of steps done before this one.
        config: the settings.
        structure: SAM's side of S4M's distillation, or None.
        optimizer, schedule, scaler: AdamW, its learning rate, fp16's loss scale.
        guard: refuses a step that is not finite.

    Returns:
        The row of the loss table, name -> (2,) tensor [sum, count] of this process, and the
        labels (N,) of the pseudo-labels of each unlabeled image.
    """
    net, device = distributed.unwrap(student), next(student.parameters()).device
    # Both passes add to the same gradients: they are cleared here and nowhere else.
    optimizer.zero_grad(set_to_none=True)
    guard.begin()
    # The unlabeled pass comes first and is freed by its own backward pass before the labeled
    # one starts: the memory of a step is that of its larger half. The gradients add up.
    both = unlabeled is not None
    row, kept = unlabeled_pass(net, labeler, unlabeled, step, config, scaler) if both else ({}, [])

    images, targets = data.to_device(labeled, device)
    # Ours; S4M pastes unlabeled images alone. Its distillation needs the images as SAM saw them.
    if config.pastes_labeled and (both or not structure):
        images, targets = copy_paste.arp(images, targets, **config.pasting(labeled[0]["seed"]))
    # Labeled images get the strong view too, or the augmentation would pass for a gain of the
    # unlabeled ones. PL-DC trains on both views of them.
    if config.labeled_view != "weak":
        strong = augment.strong_views(images, labeled, config.strong_erasing)
        images = strong if config.labeled_view == "strong" else images + strong
    views = len(images) // len(labeled)
    # Mixed precision covers the forward pass alone; a gradient has the type of its forward pass.
    with model.autocast(config, device):
        loss_s, counts, features = student(images, targets * views, config.no_object_labeled)
    # GD Eq. (total): the labeled part.
    objective = losses.total(loss_s, counts, distributed.all_sum(counts), distributed.world_size())
    row |= losses.logged(loss_s, counts, "labeled/")
    if structure and not both:
        # S4M Eq. (teacher), while pretraining: the teacher-to-be gets SAM's layout. Later the
        # pseudo-labels bring what SAM knows, through its masks.
        loss_sd = sam_distill.loss(features, labeled * views, structure)
        objective = objective + config.structure_weight * loss_sd
        row["labeled/loss_structure"] = torch.stack([loss_sd.detach(), loss_sd.new_ones(())])
    # Here the processes wait for each other: through DDP's wrapper this backward pass averages
    # the gradients over them, those of the unlabeled pass included.
    scaler.scale(objective).backward()

    # The gradient of one bad box can be a thousand times the usual; clipped it does no harm.
    # Unscale first: the limit is one for gradients, not for 65,536 times as much.
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(net.parameters(), config.clip_norm)
    # A step with NaN in it is not taken, and ends the run if it is the third in a row.
    if guard.allows(norm, row, labeled + (unlabeled or []), step + 1):
        scaler.step(optimizer)
    scaler.update()
    # The learning rate moves on even if the step was skipped: it is a function of the step.
    schedule.step()
    # DDP averages gradients only. BatchNorm's statistics are not learned by gradient: without
    # this, each process would have a student, and so a teacher, of its own.
    distributed.average_statistics(net)
    # PL-DC: the category classifier's memory keeps up with the teacher.
    if both and labeler.classifier and (step + 1) % correction.REFRESH_EVERY == 0:
        labeler.classifier.learn(labeler.teacher, labeled)
    return row, kept


def unlabeled_pass(
    net: model.MaskRCNN, labeler: Labeler, unlabeled: list[dict], step: int, config: Config, scaler
) -> tuple[dict, list[Tensor]]:
    """Pseudo-labels for B unlabeled images, and the gradient of the loss on them.

    Args as for `train_step`, but `net`: the student without DDP's wrapper. Returns as there.
    """
    device = next(net.parameters()).device
    # 1. The teacher labels the weak view, in which fewer mistakes are made.
    weak = [item["image"].to(device, non_blocking=True) for item in unlabeled]
    stages = pseudo_labels(labeler, weak, unlabeled, config, step)
    if config.filter in filters.ADAPTIVE:
        # PL-DC Eq. (adapt): the thresholds follow what the teacher predicts.
        labeler.thresholds.update(stages["predicted"])
    pseudo = stages["final"]
    if labeler.alignment:
        labeler.alignment.update(pseudo)
    del stages  # soft masks of every stage: at 1024 pixels gigabytes
    # 2. An image without a pseudo-label is left out (PL-DC): the teacher may just not have been
    #    sure. Or it is trained as background (GD, S4M), as what is missing in the others is.
    chosen = [i for i, p in enumerate(pseudo) if len(p) or config.empty_images == "background"]
    # PL-DC Eq. (PMUA): the doubtful edge of a mask is taught less than its inside.
    agreement = config.refine_calibrate and labeler.calibration.gate < calibration.OFF
    targets = [pseudo[i].target(config.uncertainty, agreement) for i in chosen]
    images, items = [weak[i] for i in chosen], [unlabeled[i] for i in chosen]
    # 3. S4M: instances are pasted from image to image, before the strong view distorts all alike.
    if config.arp in ("unlabeled", "both"):
        images, targets = copy_paste.arp(images, targets, **config.pasting(unlabeled[0]["seed"]))
    # 4. The student must see the same in the strong view: no pixel moves, the targets stay valid.
    strong = augment.strong_views(images, items, config.strong_erasing)
    loss_u, counts = None, torch.zeros(losses.COUNTS, device=device)
    # Not through DDP's wrapper: a process with no pseudo-label skips this pass, so nothing in
    # it may wait for the others. All take part in the sum of the counts.
    if chosen:
        with model.autocast(config, device):
            loss_u, counts, _ = net(strong, targets, config.no_object_unlabeled)
    total_counts = distributed.all_sum(counts)
    if chosen:
        objective = losses.total(loss_u, counts, total_counts, distributed.world_size())
        # GD Eq. (total): the unlabeled part, lambda_u L_unlabeled.
        scaler.scale(config.unsup_weight * objective).backward()
    row = losses.logged(loss_u, counts, "unlabeled/")
    row["pseudo_per_image"] = losses.entry(sum(map(len, pseudo)), len(pseudo), device)
    return row, [labels.labels for labels in pseudo]


# ------------------------------------------------------------------- the pseudo-labels


def pseudo_labels(
    labeler: Labeler, weak: list[Tensor], items: list[dict], config: Config, step: int,
    min_score: float = 1.0,
) -> dict[str, list]:  # fmt: skip
    """The teacher's pseudo-labels for B weak views, after each stage.

    Args:
        labeler: who labels.
        weak: B images (3, H, W) float in [0, 1].
        items: of `data.Stream`, for the same images; their ground truth serves --oracle alone.
        config: the settings.
        step: t, the number of steps done; PL-DC's correction fades with it (ours: measured).
        min_score: class score down to which predictions are returned, if none lower is of use.

    Returns:
        stage -> B `PseudoLabels`; the student is trained on the stage "final".
    """
    # What is of no use is not predicted, unless the audit asks: a mask is H x W floats.
    lowest = min(config.lowest_score, min_score)
    with model.autocast(config, weak[0].device):
        predicted = predict(labeler.teacher, weak, lowest)
    # PL-DC, instance level: class and mask quality decide what is kept. A wrong pseudo-label
    # teaches a mistake, which the student hands back to the teacher.
    rule = (config.filter, config.tau_class, config.tau_mask, config.min_area)
    latest = kept = [filters.keep(p, *rule, labeler.thresholds) for p in predicted]
    stages = dict(predicted=predicted, kept=kept)
    # S4M: SAM, which sees the original image, redraws the masks; it knows no classes.
    gate = labeler.calibration.gate
    if config.refine != "none" and gate < calibration.OFF:
        how = (config.refine, config.refine_points, config.refine_sampling)
        how += (gate, config.refine_calibrate, config.min_area)
        pairs = zip(kept, items, strict=True)
        latest = [refine.refine(p, labeler.embeddings, item, *how) for p, item in pairs]
        stages["refined"] = latest
    # PL-DC, category level: another classifier has a say, less and less (ours: as measured).
    if config.correction != "none":
        weight = correction.weight(step, *config.stage_ends[1:], labeler.calibration.trust)
        latest = correction.correct(latest, weak, labeler.classifier, weight)
        stages["corrected"] = latest
    # Ours: no class may crowd out another.
    if labeler.alignment:
        latest = stages["aligned"] = [labeler.alignment(labels) for labels in latest]
    # Our reading of the AAAI version: the correction decides on what was ambiguous.
    if config.filter == "three-way":
        pairs = zip(latest, kept, strict=True)
        latest = [filters.decide(*pair, labeler.thresholds) for pair in pairs]
        stages["decided"] = latest
    # Headroom, not a method: the ground truth replaces classes, masks or both.
    if config.oracle != "none":
        pairs = zip(latest, items, strict=True)
        stages["oracle"] = [audit.apply_oracle(p, i["target"], config.oracle) for p, i in pairs]
    return stages | {"final": list(stages.values())[-1]}


# -------------------------------------------------------------------- the command line


def main(argv: list[str] | None = None) -> None:
    """One line and status 2 for what the user did wrong, a traceback for what we did."""
    program.run(lambda given: train(parse(given)), argv)


if __name__ == "__main__":
    main()
