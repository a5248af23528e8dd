r"""A walk: one unlabeled image through one real step, with every value in between.

The one source of `docs/walk.md` and `docs/walk.ipynb`, which `python docs/scripts/make_walk.py`
writes. It runs as a script, too, from the project's folder:

    python docs/scripts/walk.py

Environment variables, all optional:

    WALK_PRETRAINED   a first teacher, `pretrained.pt` of a run; without it one is trained
    WALK_OUT          folder for what is written; runs/walk if not given
    WALK_FLAGS        further flags of train.py, for instance "--tau-min 0.6"

Cells are in the percent format: `# %% [markdown]` begins a text, `# %%` a piece of code.
"""
# The path to the project comes before the project.
# ruff: noqa: E402

# %% [markdown]
# # A walk through one step
#
# One unlabeled image goes through one step of training: what the teacher predicts, what the
# filter keeps, what SAM redraws, which class is corrected, which pixels count, what is pasted,
# what the student's losses are, how far one weight moves. Every number below is printed by the
# code above it, and where an equation says what a number should be, it is computed a second time
# by hand and compared (`assert`).
#
# Read it from top to bottom, in some 20 minutes, with the papers beside it: S4M (arXiv 2504.05301),
# PL-DC (arXiv 2505.11075), Guided Distillation (GD, arXiv 2308.02668). Letters are those of
# [notation.md](notation.md), names of equations those of [equations.md](equations.md). The step
# itself is `train_step` in `train.py`; this page takes it apart and, in section 13, runs it whole.
#
# Paragraphs that begin with *In this run* are about the run of docs/walk.md: seed 0, the first
# teacher of section 2, two CPU cores (x86_64) without GPU, one thread. With another teacher another
# image may be chosen.

# %%
import copy
import math
import os
import shlex
import sys
from pathlib import Path

# Started in the project's folder: the project, and the drawings of this walk.
sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "docs", "scripts")]

# %%
import torch
import walk_pictures as pictures
from walk_pictures import table

import train
from ssis import augment, calibration, config, copy_paste, correction, data, filters, losses
from ssis import prototypes, refine
from ssis.datasets import parts, split
from ssis.engine import loader, resume
from ssis.engine.build import build
from ssis.engine.guard import Guard
from ssis.io.embeddings import Embeddings
from ssis.report import audit
from ssis.targets import mask_iou, match, sanitize
from ssis.teacher import ema_update

# %% [markdown]
# ## 1. The run
#
# The settings are those of the row "full, adaptive filter" of the ladder without scale jitter in
# docs/results.md: the built-in shapes, seed 0, 64 of 1,280 images labeled. With PL-DC's filter,
# every part of the papers is there to be seen; what `full` measures instead comes at the end.
# Without jitter and pasted labels the first teacher makes more mistakes: there is more to mend.

# %%
FLAGS = "--method full --filter adaptive --seed 0 --pretrain-steps 900 --mutual-steps 600"
FLAGS += " --short-side-min 96 --arp unlabeled"
FLAGS = shlex.split(FLAGS + " --device cpu " + os.environ.get("WALK_FLAGS", ""))
settings = config.parse([*FLAGS, "--output", str(pictures.OUT / "run")])

switches = (settings.refine, settings.correction, settings.arp)
if settings.filter != "adaptive" or "none" in switches or not settings.uncertainty:
    raise SystemExit("the walk shows every part of --method full; switch none of them off")
shown = "filter tau_min tau_max correction uncertainty refine refine_points refine_gate arp"
table("setting  value", [(name, getattr(settings, name)) for name in shown.split()])

# %% [markdown]
# ## 2. The first teacher
#
# Before the first pseudo-label there is a network that was trained on the labeled images alone.
# Make it once, in 6 to 10 minutes on two CPU cores:
#
# ```
# python train.py --pretrain-steps 900 --burnin-steps 0 --mutual-steps 0 --short-side-min 96 \
#     --arp unlabeled --output runs/first
# ```
#
# and give it as `WALK_PRETRAINED=runs/first/checkpoint.pt`. Without that the next cell makes the
# same one; a second start of this walk finds it. The one of this page has a mask AP of 21.0 on the
# test part. It was made with `OMP_NUM_THREADS=1`: another number of threads, or another machine,
# adds floats in another order, and after 900 steps that is another network.

# %%
first_teacher = os.environ.get("WALK_PRETRAINED", "")
if not first_teacher:
    folder = pictures.OUT / "first"
    train.main([*FLAGS, "--burnin-steps", "0", "--mutual-steps", "0", "--output", str(folder)])
    first_teacher = folder / "checkpoint.pt"

# %% [markdown]
# ## 3. The burn-in begins
#
# What `train.train` does before its loop: data, split, streams, models. `restore` puts the first
# teacher's weights, its optimizer and the random state back. Then, as in `train.train` at the step
# `pretrain_end`:
#
# * teacher := student, frozen during the burn-in (GD); the student goes on from its weights, unless
#   `--burnin-init fresh` is given;
# * PL-DC's thresholds start from the class frequencies (below);
# * PL-DC's category classifier gets its memory: labeled instances, as this teacher sees them.
#
# The thresholds lie between two limits, by the frequency of each class among the labeled instances:
#
# $$T_k^0 = T_{\mathrm{min}} + (T_{\mathrm{max}} - T_{\mathrm{min}}) \, \frac{n_k}{N}$$
#
# PL-DC Eq. (init)

# %%
parts.prepare(settings)
train_set, val_set, _ = parts.open_parts(settings)
settings.run_folder.mkdir(parents=True, exist_ok=True)
labeled, unlabeled = split.split(train_set, settings, settings.run_folder / "labeled.json")
streams = data.make_streams(
    train_set, labeled, unlabeled, settings.view_size, settings.seed, settings.oracle
)

device = torch.device("cpu")
made = build(settings, train_set, 0, 1, device, val_set)
student, labeler, structure, optimizer, schedule, scaler = made
teacher, thresholds, classifier, embeddings, *_ = labeler
learning = dict(optimizer=optimizer, schedule=schedule, scaler=scaler)
state = dict(student=student, **labeler._asdict(), **learning)
names = train_set.names
saved = resume.restore(Path(first_teacher), state, settings, names, rank=0, first_teacher=True)
t = saved["step"]

teacher.load_state_dict(student.state_dict())
frequency = train_set.class_shares(labeled)  # (C,) n_k / N
thresholds.start(frequency)
correction.fill(classifier, teacher, streams.labeled, rank=0, world_size=1)

# By hand: the same thresholds.
start = settings.tau_min + (settings.tau_max - settings.tau_min) * frequency
assert torch.allclose(start.float(), thresholds.values[0])

print(f"step {t}: {len(labeled)} labeled, {len(unlabeled)} unlabeled images")
table(
    "class  fraction n_k / N  T_class  T_mask  remembered",
    list(
        zip(
            names,
            frequency.tolist(),
            *thresholds.values.tolist(),
            classifier.seen.clamp(max=settings.prototypes).tolist(),
            strict=True,
        )
    ),
)

# %% [markdown]
# ## 4. A batch, and the image to follow
#
# The stream gives unlabeled images without their ground truth. We look through the batches that
# would come next in training, and compute the pseudo-labels of each (`train.pseudo_labels`, which
# the step calls too) without training on them. We look for an image with all of this: at least two
# pseudo-labels, a candidate that the filter drops, a class that is corrected rightly (here alone,
# and in section 15, the ground truth is looked at), a mask that SAM redraws, one whose redrawing
# the gate refuses, and a partner for copy-paste. Of several such images it is the one with the most
# right pseudo-labels in the end. So the image is *chosen*, and does not say how often each of these
# things happens; the table does. The walk then takes that batch as if it were the first one of the
# burn-in.

# %%
BATCHES = 8


def paired(final: list, seed: int) -> list[tuple[int, int]]:
    """ARP's pairs in a batch: as `copy_paste.arp` draws them among images with pseudo-labels."""
    usable = [i for i, labels in enumerate(final) if len(labels)]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(usable), generator=generator).tolist()
    count = max(1, len(usable) // 4) if len(usable) > 1 else 0
    return [(usable[order[2 * k]], usable[order[2 * k + 1]]) for k in range(count)]


def differs(one, other) -> list[bool]:
    """Which masks of two stages of an image are not the same."""
    return [not torch.equal(a, b) for a, b in zip(one.masks, other.masks, strict=True)]


def truth_of(item: dict) -> dict:
    """The ground truth in the weak view; the stream does not give it, training never reads it."""
    image, target = train_set.image(item["index"]), train_set.target(item["index"])
    return sanitize(augment.weak_view(image, target, settings.view_size, item["seed"])[1])


def right(final, truth: dict) -> torch.Tensor:
    """Which pseudo-labels lie on an instance and have its class, (N,) bool."""
    partner = match(final.boxes, truth["boxes"])
    return (partner >= 0) & (truth["labels"][partner] == final.labels)


def events(stages: dict, i: int, pairs: list, item: dict) -> dict[str, bool]:
    """What happens to image i of a batch."""
    predicted, kept, refined, final = (
        stages[name][i] for name in ("predicted", "kept", "refined", "corrected")
    )
    redrawn, corrected = differs(kept, refined), refined.labels != final.labels
    return {
        "two kept": len(kept) >= 2,
        "one dropped": (predicted.class_quality >= settings.tau_min).sum().item() > len(kept),
        "one corrected rightly": (corrected & right(final, truth_of(item))).any().item(),
        "one redrawn": any(redrawn),
        "one refused by the gate": not all(redrawn),
        "in a pair": any(i in pair for pair in pairs),
    }


t_max = settings.stage_ends[-1]
shard = data.Shard(settings.unlabeled_batch, t, t_max, 0, 1)
batches = loader.batches(streams.unlabeled, shard, 0)
seen, best, chosen = [], (-1,), None
for number in range(BATCHES):
    candidates = next(batches)
    weak_views = [i["image"] for i in candidates]
    stages = train.pseudo_labels(labeler, weak_views, candidates, settings, t, audit.PREDICTED)
    pairs = paired(stages["final"], candidates[0]["seed"])
    for i in range(len(candidates)):
        seen.append(events(stages, i, pairs, candidates[i]))
        rank = sum(seen[-1].values()), right(stages["final"][i], truth_of(candidates[i])).sum()
        if len(stages["final"][i]) and rank > best:
            best, place, batch, chosen = rank, number, candidates, i
if chosen is None:
    raise SystemExit(
        f"no pseudo-label in {len(seen)} images: this teacher is too unsure for its filter, so "
        "there is nothing to follow; train it longer, or lower --tau-min and --tau-max"
    )

print(f"image {chosen} of batch {place}, {best[0]} of {len(seen[0])} events")
table("event  images", [(name, f"{sum(e[name] for e in seen)} of {len(seen)}") for name in seen[0]])

# %% [markdown]
# ## 5. The weak view
#
# Weak is resize and flip only, so the predictions are made in the very frame in which the student
# is trained. These images need no resizing. `geometry` remembers the way back, for SAM sees the
# original file only.

# %%
item = batch[chosen]
weak, geometry = item["image"], item["geometry"]
original = train_set.image(item["index"])
print("file", train_set.files[item["index"]], "original", tuple(original.shape), original.dtype)
print("weak view", tuple(weak.shape), weak.dtype, f"values {weak.min():.3f} to {weak.max():.3f}")
print("geometry:", geometry)

# By hand: mirrored or not, and from 0..255 to 0..1.
if geometry.view == geometry.original:
    assert torch.allclose(weak, geometry.to_view(original) / 255)

# %% [markdown]
# ## 6. What the teacher predicts
#
# The teacher sees the weak view. `predict` gives what the methods need and torchvision throws
# away: the class distribution P of each box, and the soft mask p. Two qualities follow,
#
# $$c = \max_k P(k), \qquad m = \mathrm{mean}\{p_{xy} : p_{xy} > 0.5\}$$
#
# PL-DC Eq. (quality)
#
# What is missing to a sum of 1 is the probability of background. Shown is everything from c = 0.3
# on; the step itself asks only for what could pass the filter (`min_score`).

# %%
weak_views = [i["image"] for i in batch]
stages = train.pseudo_labels(labeler, weak_views, batch, settings, t, audit.PREDICTED)
predicted = stages["predicted"][chosen]
c, m = predicted.class_quality, predicted.mask_quality  # (N,), (N,)

rows = []
for k, P in enumerate(predicted.distribution):
    # By hand: c is P of the label, m the mean of p over the mask.
    p = predicted.mask_probs[k]
    assert c[k] == P[predicted.labels[k] - 1]
    assert m[k] == 0 or torch.isclose(m[k], p[p > 0.5].mean())
    box = " ".join(f"{side:.0f}" for side in predicted.boxes[k])
    rows.append((k, box, train_set.names[predicted.labels[k] - 1], c[k], m[k]))
table("#  box (xyxy)  class  c  m", rows)
print()
rows = [(k, *P.tolist(), 1 - P.sum().item()) for k, P in enumerate(predicted.distribution)]
table("#  P(" + ")  P(".join(train_set.names) + ")  background", rows)

# %%
count = min(len(predicted), 7)
figure, axes = pictures.sheet(math.ceil((1 + count) / 4), 4)
axes = [axis for row in axes for axis in row]
pictures.panel(axes[0], weak, "the weak view")
for k, axis in enumerate(axes[1 : 1 + count]):
    title = f"#{k} {train_set.names[predicted.labels[k] - 1]}, c {c[k]:.2f}, m {m[k]:.2f}"
    pictures.panel(axis, weak, title, predicted[[k]])
for axis in axes[1 + count :]:
    axis.remove()
pictures.show(
    figure, "1-predicted", "The weak view, and each thing that the teacher predicts on it"
)

# %% [markdown]
# One proposal can appear twice, under two classes, as in torchvision; but only one of the two can
# have c > 0.5, and then c is the largest of its P.
#
# *In this run* #1 is a star, and the teacher is certain of a cross: c = 0.98. No threshold on c
# removes it, nor #0, a circle that it calls a square. The masks of #3 and #4 lie on a square and on
# the cross below it, half on each.
#
# ## 7. The filter
#
# PL-DC thresholds class quality and mask quality separately, each at a value of the predicted
# class k:
#
# $$c \ge T^{\mathrm{class}}_k \;\wedge\; m \ge T^{\mathrm{mask}}_k$$
#
# PL-DC Eq. (adaptive)

# %%
T_class, T_mask = thresholds.values[:, predicted.labels - 1]  # (N,), (N,)
area = filters.area(predicted)
passes = (c >= T_class) & (m >= T_mask) & (area > settings.min_area)
# By hand and by the filter: the same instances.
kept = stages["kept"][chosen]
assert torch.equal(predicted[passes].boxes, kept.boxes)
# The number of each kept instance, in all that follows.
ids = torch.where(passes)[0].tolist()

rows = []
for k in range(len(predicted)):
    tests = {"c": c[k] >= T_class[k], "m": m[k] >= T_mask[k], "area": area[k] > settings.min_area}
    failed = " and ".join(name for name, good in tests.items() if not good)
    name = train_set.names[predicted.labels[k] - 1]
    numbers = (c[k], T_class[k], m[k], T_mask[k], area[k])
    rows.append((f"#{k}", name, *numbers, f"no: {failed}" if failed else "yes"))
table("#  class  c  T_class  m  T_mask  area  kept", rows)

# %% [markdown]
# What the other rules would keep of the same predictions, with their own thresholds `tau_class` and
# `tau_mask`. `coupled` is the usual practice c · m, in which a good class makes up for a bad mask.
# *In this run* `coupled` drops the two bad masks: neither their c nor their m is high. Each alone
# passes its threshold.

# %%
for rule in ("score", "coupled", "dual", "adaptive"):
    limits = (rule, settings.tau_class, settings.tau_mask, settings.min_area, thresholds)
    good = [k for k in range(len(predicted)) if filters.keep(predicted[[k]], *limits)]
    print(f"{rule:9}", *(f"#{k}" for k in good))
k = ids[0]
print(f"#{k}: c * m = {c[k]:.3f} * {m[k]:.3f} = {c[k] * m[k]:.3f}, tau_class {settings.tau_class}")

# %% [markdown]
# ## 8. SAM redraws the masks
#
# The teacher finds objects better than it outlines them; SAM outlines what it is pointed at. First
# the points: K pixels of each mask, without replacement, with probability
#
# $$P(x) \propto p(x) \; \text{inside} \; \{p > 0.5\}$$
#
# S4M Eq. (PR sampling)
#
# They are drawn in the view, and mapped to the original frame, in which SAM knows the image.

# %%
# `refine.refine`, step by step, on as many instances as it takes at a time.
part = kept[slice(refine.CHUNK)]
generator = torch.Generator().manual_seed(item["seed"])
weights = refine.point_weights(part, settings.refine_sampling)  # (N, H, W)
places = refine.sample_points(weights, settings.refine_points, generator)  # (N, K, 2)
prompts = geometry.to_original(places)
# By hand: without a crop the way back is a mirror and a scale.
height, width = geometry.view
x = width - places[..., 0] if geometry.flip else places[..., 0]
assert torch.allclose(prompts[..., 0], x * geometry.original[1] / width)

rows = []
for k, (view, file) in enumerate(zip(places, prompts, strict=True)):
    at = view.long()
    p = part.mask_probs[k, at[:, 1], at[:, 0]]
    written = ["  ".join(f"({x:.1f}, {y:.1f})" for x, y in frame) for frame in (view, file)]
    rows.append((f"#{ids[k]}", *written, p))
table("#  points in the view (x, y)  in the original  p there", rows)

# %% [markdown]
# SAM answers each prompt with three masks (a point may mean a part or a whole), and with a
# predicted IoU for each. The paper takes the one with the highest predicted IoU,
#
# $$k^* = \mathrm{argmax}_k \; \widehat{\mathrm{IoU}}_k$$
#
# S4M Eq. (PR choice)
#
# The default here is the one that agrees best with the teacher's mask, and only if their IoU, the
# *agreement*, passes the gate; otherwise the teacher's mask stays.

# %%
embedding = embeddings[item["index"]]
logits, predicted_iou = embeddings.sam.candidates(
    embedding, prompts, geometry.original, geometry.scaled
)
logits = geometry.to_view(logits)  # (N, 3, H, W), in the view again
agreement = mask_iou(logits > 0, part.masks[:, None])  # (N, 3)
# By hand: IoU of the first instance and SAM's first candidate.
a, b = logits[0, 0] > 0, part.masks[0]
assert agreement[0, 0] == (a & b).sum() / (a | b).sum().clamp(min=1)

score = predicted_iou if settings.refine == "iou" else agreement
best = score.argmax(dim=1)  # (N,)
which = torch.arange(len(best))
redrawn = logits[which, best].sigmoid()  # (N, H, W)
enough = (redrawn > 0.5).flatten(1).sum(dim=1) > settings.min_area
taken = (agreement[which, best] >= settings.refine_gate) & enough
# By hand and by `refine.refine`: the same masks.
refined = stages["refined"][chosen]
soft = torch.where(taken[:, None, None], redrawn, part.mask_probs)
assert torch.equal(refined.masks[: len(part)], soft > 0.5)

rows = [
    (f"#{ids[k]}", predicted_iou[k], agreement[k], best[k] + 1, taken[k].item())
    + (part.mask_quality[k], refined.mask_quality[k])
    for k in range(len(part))
]
table("#  predicted IoU  agreement  best  taken  m before  m after", rows)

# %%
count = min(len(part), pictures.INSTANCES)
figure, axes = pictures.sheet(count, 5)
for k, row in enumerate(axes):
    one, box = kept[[k]], part.boxes[k]
    pictures.panel(row[0], weak, f"#{ids[k]}: teacher's mask, points", one, crop=box)
    pictures.points(row[0], places[k])
    for j in range(3):
        mark = ", best" if j == best[k] else ""
        candidate = dict(masks=logits[k, j : j + 1] > 0, labels=one.labels)
        title = f"SAM's {j + 1}: agrees {agreement[k, j]:.2f}{mark}"
        pictures.panel(row[1 + j], weak, title, candidate, crop=box)
    title = "taken" if taken[k] else "refused: teacher's stays"
    pictures.panel(row[4], weak, title, refined[[k]], crop=box)
pictures.show(figure, "2-sam", "For each instance: points, SAM's three candidates, the mask taken")

# %% [markdown]
# *In this run* SAM gives the star its points and cuts the circle off where the square begins. The
# points of #3, whose mask lies on two objects, all fall on the cross; so SAM draws the cross, which
# the teacher's mask hardly agrees with, and the gate refuses. SAM predicts an IoU of 0.86 for that
# very mask: it outlines well, and does not know what was meant. Of #4, on the same two objects, a
# ragged candidate agrees just enough, though SAM itself predicts an IoU of 0.19 for it.
#
# ## 9. The classes are corrected
#
# This comes after SAM, because a better silhouette is easier to name. The category classifier
# compares each instance with the remembered labeled ones: the teacher's features inside the mask,
# and the silhouette. The cosines of the three nearest of each class are averaged, and a softmax
# makes them a distribution. It is mixed with the teacher's, without background:
#
# $$p = w(t) \, p_{\mathrm{category}} + (1 - w(t)) \, p_{\mathrm{teacher}}$$
#
# PL-DC Eq. (DICC)
#
# $$w(t) = \frac{1}{4} \left(\cos \pi \frac{t - t_{\mathrm{burn}}} {t_{\mathrm{max}} -
# t_{\mathrm{burn}}} + 1\right)$$
#
# PL-DC Eq. (w)

# %%
_, t_burn, t_max = settings.stage_ends
w = correction.weight(t, t_burn, t_max)
rows = []
for step in (t, t_burn, *(t_burn + (t_max - t_burn) * k // 4 for k in range(1, 5))):
    by_hand = 0.25 * (math.cos(math.pi * (step - t_burn) / (t_max - t_burn)) + 1)
    by_hand = 0.5 if step <= t_burn else by_hand
    assert math.isclose(by_hand, correction.weight(step, t_burn, t_max))
    rows.append((step, by_hand))
table("step t  w(t)", rows)

# %%
opinion = classifier(weak, refined)  # (N, C)
# The teacher's over the classes alone: the instance was kept, so background is no question.
named_by_teacher = refined.distribution / refined.distribution.sum(dim=1, keepdim=True)
mixed = w * opinion + (1 - w) * named_by_teacher
quality, index = mixed.max(dim=1)
final = stages["corrected"][chosen]
# By hand and by `correction.correct`: the same labels, the same class qualities.
assert torch.equal(final.labels, index + 1) and torch.allclose(final.class_quality, quality)

rows = []
for k, label in enumerate(refined.labels):
    for who, P in {"teacher": named_by_teacher, "category": opinion, "mixed": mixed}.items():
        says, was = train_set.names[P[k].argmax()], train_set.names[label - 1]
        note = f" (was {was})" if who == "mixed" and says != was else ""
        rows.append((f"#{ids[k]}", who, *P[k].tolist(), says + note))
table("#  who  P(" + ")  P(".join(train_set.names) + ")  label", rows)

# %%
count = min(len(refined), pictures.INSTANCES)
figure, axes = pictures.sheet(count, 3, 0.5)
for k, row in enumerate(axes):
    opinions = {
        f"#{ids[k]}: the teacher": named_by_teacher[k],
        "the category classifier": opinion[k],
        f"mixed, w = {w:.2f}": mixed[k],
    }
    for axis, (title, P) in zip(row, opinions.items(), strict=True):
        pictures.bars(axis, P, train_set.names, title)
pictures.show(figure, "3-classes", "For each instance: class distributions of both, and mixed")

# %% [markdown]
# By hand for one of them, a corrected one if there is any; and below it what the category
# classifier sees: its silhouette in a 16 x 16 grid, beside the nearest remembered instance of each
# class, with the cosine of the whole description, features and silhouette.

# %%
changed = torch.where(final.labels != refined.labels)[0].tolist()
one = changed[0] if changed else 0
query = classifier.describe(refined.features, refined.mask_probs, refined.feature_boxes)[one]
nearest, means = [], []
for k in range(len(train_set.names)):
    memory = classifier.bank[k, : classifier.seen[k]]  # (remembered, 49 D + 256)
    cosines, order = (memory @ query).sort(descending=True)
    means.append(cosines[: prototypes.NEAREST].mean())
    nearest.append((cosines[0].item(), memory[order[0]]))
by_hand = (torch.stack(means) / prototypes.TEMPERATURE).softmax(dim=0)
assert torch.allclose(by_hand, opinion[one], atol=1e-3)
rows = list(zip(train_set.names, means, by_hand, strict=True))
print(f"#{ids[one]}")
table("class  mean of the 3 nearest  p_category", rows)

# %%
figure, [axes] = pictures.sheet(1, 1 + len(nearest))
pictures.heat(axes[0], pictures.silhouette(query), f"#{ids[one]}")
for axis, name, (cosine, described) in zip(axes[1:], train_set.names, nearest, strict=True):
    pictures.heat(axis, pictures.silhouette(described), f"{name} {cosine:.2f}")
pictures.show(figure, "4-silhouettes", "A silhouette beside the nearest remembered of each class")

# %% [markdown]
# *In this run* the category classifier's opinion is nearly all or nothing: its softmax has a
# temperature of 0.005, so a cosine that is higher by 0.05 is everything. At w = 0.5 it therefore
# decides alone, even against a teacher that gives 0.995 to another class; as w falls, it will no
# longer. #0, #1 and #2 get their right classes. #4, the ragged mask, is taken for a star.
#
# The label changed, the mask and the order did not. The corrected instance is not filtered again.
#
# ## 10. Which pixels count
#
# A mask is sure inside and doubtful along its edge. Each pixel's mask loss will be weighted by
# 1 - u, with
#
# $$u = 1 - 2 |p - 0.5|$$
#
# PL-DC Eq. (uncertainty)
#
# p is that of the mask that the student is taught: SAM's where it was taken. Beside it, for
# comparison, the teacher's. Along one row of pixels, across the left edge of an instance:

# %%
one = taken.nonzero()[0].item() if taken.any() else 0
mask = final.masks[one]
y = torch.where(mask)[0].median().item()
edge = torch.where(mask[y])[0][0].item() if mask[y].any() else 0
xs = range(max(0, edge - 5), min(mask.shape[1], edge + 6))
rows = []
for x in xs:
    before, after = kept.mask_probs[one, y, x], final.mask_probs[one, y, x]
    # By hand, each pixel.
    u_before, u_after = 1 - 2 * abs(before - 0.5), 1 - 2 * abs(after - 0.5)
    assert torch.isclose(1 - u_after, losses.certainty(after))
    rows.append((x, before, 1 - u_before, after, 1 - u_after, bool(after > 0.5)))
print(f"#{ids[one]}, row y = {y}")
table("x  p teacher  1 - u  p taught  1 - u taught  in the mask", rows)

# %%
figure, [axes] = pictures.sheet(1, 3)
crop, number = final.boxes[one], ids[one]
before, after = (losses.certainty(stage.mask_probs[one]) for stage in (kept, final))
pictures.panel(axes[0], weak, f"#{number} as taught, and the row", final[[one]], crop=crop)
pictures.heat(axes[1], before, "1 - u of the teacher's mask", crop)
pictures.heat(axes[2], after, "1 - u of the mask taught", crop)
for axis in axes:
    axis.plot([xs[0], xs[-1] + 1], [y + 0.5, y + 0.5], color="cyan", linewidth=1.5)
pictures.show(
    figure, "5-certainty", "An instance, and the weights of its pixels, before and after SAM"
)

# %% [markdown]
# In the two maps black is 0, a pixel that does not count, and white is 1. SAM's edge is thinner
# than the teacher's, so fewer pixels are weighed down: u depends on whose mask is taught.
#
# ## 11. Copy-paste, and the strong view
#
# S4M's ARP pastes the instances of one image onto another, and the other way round, max(1, B // 4)
# pairs in a batch. Images without any pseudo-label are left out of the step, not trained as
# background. What is pasted lies in front of what was there. With M the union of what is pasted,
#
# $$x = M \odot x_{\mathrm{above}} + (1 - M) \odot x_{\mathrm{below}}$$
#
# S4M Eq. (ARP)


# %%
def named(labels) -> list[str]:
    """Class names of labels."""
    return [train_set.names[label - 1] for label in labels]


pseudo = stages["final"]
usable = [i for i, labels in enumerate(pseudo) if len(labels)]
weaks = [batch[i]["image"] for i in usable]
targets = [pseudo[i].target(settings.uncertainty, settings.refine_calibrate) for i in usable]
pasted, pasted_targets = copy_paste.arp(
    weaks, targets, settings.arp_min_area, settings.arp_jitter, batch[0]["seed"]
)

pairs = paired(pseudo, batch[0]["seed"])
partner = next((b if a == chosen else a for a, b in pairs if chosen in (a, b)), None)
print("images with pseudo-labels:", usable, " pairs:", pairs, " ours:", chosen)
# By hand: outside of the pairs nothing has changed.
moved = {i for pair in pairs for i in pair}
assert all(pasted[k] is weaks[k] for k, i in enumerate(usable) if i not in moved)

here = usable.index(chosen)
target = pasted_targets[here]
if partner is not None:
    # By hand, for images of one size: the partner's masks, but for the smallest ones.
    there = usable.index(partner)
    above = targets[there]["masks"].bool()
    big = above.flatten(1).sum(dim=1) >= settings.arp_min_area * weak[0].numel()
    assert torch.equal(pasted[here], torch.where(above[big].any(dim=0), weaks[there], weak))

rows = []
for k, (label, mask) in enumerate(zip(target["labels"], target["masks"], strict=True)):
    weights = target["mask_weights"][k]
    # Where the pixels of the mask come from.
    own = mask.bool() & (pasted[here] == weak).all(dim=0)
    source = "this image" if own.sum() > mask.sum() / 2 else "partner"
    box = " ".join(f"{side:.0f}" for side in target["boxes"][k])
    name = train_set.names[label - 1]
    rows.append((k, source, name, box, mask.sum(), weights[mask > 0].mean()))
table("instance  from  class  box  pixels  mean 1 - u inside", rows)

# %%
figure, axes = pictures.sheet(2 if partner is not None else 1, 2)

pictures.panel(axes[0][0], weak, "this image, pseudo-labeled", final, named(final.labels))
pictures.panel(axes[0][1], pasted[here], "after copy-paste", target, named(target["labels"]))
if partner is not None:
    for axis, image, source, title in (
        (axes[1][0], weaks[there], targets[there], "its partner, pseudo-labeled"),
        (axes[1][1], pasted[there], pasted_targets[there], "after copy-paste"),
    ):
        pictures.panel(axis, image, title, source, named(source["labels"]))
pictures.show(figure, "6-pasted", "This image and its partner, before and after copy-paste")

# %% [markdown]
# *In this run* the partner's star hides a part of the square, the cross and the ragged #4. And the
# bad masks are pasted along with the good ones: #4 brings rags of the square and of the background
# into the partner's image. S4M pastes *refined* masks so that there are few of them.
#
# The student must say the same of the *strong* view: colors, gray, blur. No pixel moves, so the
# targets stay valid untouched. The seed is the item's own.

# %%
strong = augment.strong_views(pasted, [batch[i] for i in usable])
table(
    "view  mean of red, green, blue  deviation",
    [
        (view, image.mean(dim=(1, 2)), image.std(dim=(1, 2)))
        for view, image in (("after copy-paste", pasted[here]), ("strong", strong[here]))
    ],
)

# %%
figure, [axes] = pictures.sheet(1, 3)
pictures.panel(axes[0], weak, "weak view: what the teacher saw")
pictures.panel(axes[1], strong[here], "strong view: what the student sees")
pictures.panel(axes[2], strong[here], "... and what it is taught", target, named(target["labels"]))
pictures.show(figure, "7-strong", "Weak view, strong view, and the strong view with its targets")

# %% [markdown]
# ## 12. The student's losses
#
# Mask R-CNN's five, on the strong views of the batch, in a copy of the student so that nothing is
# used up: a forward pass in training mode draws anchors and proposals at random and moves
# BatchNorm's statistics. Once as it is, once without the pixel weights, with the same draw.
#
# $$L_{\mathrm{mask}} = \mathrm{mean}[(1 - u) \cdot \mathrm{BCE}]$$
#
# PL-DC Eq. (PMUA)
#
# Then the labeled images of the step, in the strong view too, and the whole objective:
#
# $$L = L_{\mathrm{labeled}} + \lambda_u L_{\mathrm{unlabeled}}$$
#
# GD Eq. (total)

# %%
labeled_batch = next(
    loader.batches(streams.labeled, data.Shard(settings.labeled_batch, t + place, t_max, 0, 1), 0)
)
labeled_targets = [part["target"] for part in labeled_batch]
labeled_strong = augment.strong_views([part["image"] for part in labeled_batch], labeled_batch)

with torch.random.fork_rng():
    # The two passes in the step's order: the second draws after the first.
    trial = copy.deepcopy(student)
    loss_u, counts_u, _ = trial(strong, pasted_targets)
    loss_s, counts_s, _ = trial(labeled_strong, labeled_targets)
with torch.random.fork_rng():
    bare = [{k: v for k, v in t.items() if k != "mask_weights"} for t in pasted_targets]
    loss_bare, _, _ = copy.deepcopy(student)(strong, bare)

rows = []
for name, column in losses.COUNT_OF.items():
    values = (loss_u[name], loss_bare[name], loss_s[name])
    rows.append((name, *(value.item() for value in values), int(counts_u[column])))
L_u, L_bare, L_s = (sum(part.values()).item() for part in (loss_u, loss_bare, loss_s))
rows.append(("sum", L_u, L_bare, L_s, ""))
table("loss  unlabeled  without 1 - u  labeled  mean over (unlabeled)", rows)

# By hand, and by `losses.total`, whose factors are 1 on one process.
total = L_s + settings.unsup_weight * L_u
function = [losses.total(*pair, pair[1], 1) for pair in ((loss_s, counts_s), (loss_u, counts_u))]
assert math.isclose(total, (function[0] + settings.unsup_weight * function[1]).item(), rel_tol=1e-5)
print(f"L = {L_s:.3f} + {settings.unsup_weight} * {L_u:.3f} = {total:.3f}")

# %%
count = min(4, len(labeled_batch))
figure, [axes] = pictures.sheet(1, count)
rows = zip(labeled_strong, labeled_targets, labeled_batch, strict=True)
for axis, (image, taught, one) in zip(axes, rows, strict=False):
    title = train_set.files[one["index"]]
    pictures.panel(axis, image, title, taught, named(taught["labels"]))
pictures.show(figure, "8-labeled", "Strong views of labeled images, with their ground truth")

# %% [markdown]
# The weights touch `loss_mask` alone, and make it smaller: the mean stays over all pixels of the
# 28 x 28 targets. The labeled images have been learned by heart in 900 steps; the larger loss
# on the unlabeled ones is what is new in them, and what is wrong in their pseudo-labels.
#
# ## 13. The step
#
# Now the real one: `train.train_step` does all of the above again, on the same batch, and then goes
# backward and takes one step of AdamW with clipped gradients. Its row of the loss table must show
# the losses that were found by hand. One weight is followed: the middle of the first filter.

# %%
name, at = "backbone.body.conv1.weight", (0, 0, 3, 3)
weight = dict(student.named_parameters())[name]
group = next(g for g in optimizer.param_groups if any(p is weight for p in g["params"]))
before, lr, old_thresholds = weight[at].item(), group["lr"], thresholds.values.clone()
old_teacher = {key: value.clone() for key, value in teacher.state_dict().items()}

guard = Guard(student, train_set.files, settings.run_folder, False, 0)
row, _ = train.train_step(
    student, labeler, labeled_batch, batch, t, settings,
    structure, optimizer, schedule, scaler, guard,
)  # fmt: skip

for prefix, by_hand in (("unlabeled/", loss_u), ("labeled/", loss_s)):
    for key, value in by_hand.items():
        logged, number = row[prefix + key].tolist()
        assert math.isclose(logged / max(number, 1), value.item(), rel_tol=1e-3), prefix + key
print(
    f"pseudo-labels: {int(row['pseudo_per_image'][0])} in {int(row['pseudo_per_image'][1])} images"
)

# AdamW by hand, from its own averages of the gradient and of its square.
memory = optimizer.state[weight]
first, square, steps = memory["exp_avg"][at], memory["exp_avg_sq"][at], memory["step"].item()
(beta1, beta2), eps = group["betas"], group["eps"]
direction = (first / (1 - beta1**steps)) / ((square / (1 - beta2**steps)).sqrt() + eps)
by_hand = before * (1 - lr * group["weight_decay"]) - lr * direction.item()
after = weight[at].item()
assert math.isclose(by_hand, after, abs_tol=1e-6)
print(f"student's {name}{list(at)}: {before:.6f} -> {after:.6f}")
print(f"gradient, clipped: {weight.grad[at]:.6f}; learning rate {lr}")

# %% [markdown]
# The thresholds have followed what the teacher predicted in this batch, candidates of each class:
#
# $$T_k \leftarrow a T_k + (1 - a) \, \bar q_k$$
#
# PL-DC Eq. (adapt)

# %%
a, rows = settings.threshold_decay, []
for k, name_k in enumerate(train_set.names):
    said = torch.cat(
        [
            torch.stack([one.class_quality, one.mask_quality])[:, one.labels == k + 1]
            for one in (p[p.class_quality >= settings.tau_min] for p in stages["predicted"])
        ],
        dim=1,
    )  # (2, candidates of class k)
    old, new = old_thresholds[:, k], thresholds.values[:, k]
    by_hand = a * old + (1 - a) * said.mean(dim=1) if said.numel() else old
    assert torch.allclose(by_hand.clamp(settings.tau_min, settings.tau_max), new, atol=1e-5)
    rows.append((name_k, said.shape[1], old, new))
table("class  candidates  T_class, T_mask before  after", rows)

# %% [markdown]
# ## 14. The teacher follows
#
# In the guided burn-in the teacher is frozen: the step is over. In mutual learning, from step
# t_burn on, each step ends with
#
# $$\theta_t \leftarrow \alpha \theta_t + (1 - \alpha) \theta_s$$
#
# GD Eq. (EMA)
#
# over weights and float buffers (`ema_update` in `ssis/teacher.py`); integer buffers, BatchNorm's
# count of batches, are copied. Here it is done once, as if the burn-in were over.

# %%
ema_update(teacher, student, settings.ema_decay)
new_teacher, new_student = teacher.state_dict(), student.state_dict()
alpha = settings.ema_decay
for key, old in old_teacher.items():
    # By hand, every entry.
    average = alpha * old + (1 - alpha) * new_student[key]
    by_hand = average if old.is_floating_point() else new_student[key]
    assert torch.allclose(by_hand, new_teacher[key], atol=1e-6), key

rows = []
for key, where in ((name, at), ("backbone.body.bn1.running_mean", 0)):
    values = [part[key][where].item() for part in (old_teacher, new_student, new_teacher)]
    rows.append((key, *(f"{value:.8f}" for value in values)))
table("entry  teacher before  student  teacher after", rows)
print(f"alpha = {alpha}: {alpha} * {rows[0][1]} + {1 - alpha:.2f} * {rows[0][2]} = {rows[0][3]}")

# %% [markdown]
# ## 15. Was it right?
#
# The ground truth of this image is on the disk, but training never reads it. Here it is, moved into
# the weak view, so that you can judge what the stages did. An IoU is that of masks.

# %%
ground_truth = truth_of(item)
true_masks, rows = ground_truth["masks"].bool(), []
for k, j in enumerate(match(predicted.boxes, ground_truth["boxes"]).tolist()):
    says = train_set.names[predicted.labels[k] - 1]
    true = train_set.names[ground_truth["labels"][j] - 1] if j >= 0 else "nothing"
    now, overlaps = "dropped", ["", ""]
    if k in ids:
        now = train_set.names[final.labels[ids.index(k)] - 1]
        masks = (predicted.masks[k], final.masks[ids.index(k)])
        overlaps = [mask_iou(mask, true_masks[j]).item() if j >= 0 else "" for mask in masks]
    rows.append((f"#{k}", true, says, now, *overlaps))
table("#  ground truth  teacher  taught  IoU teacher's mask  IoU mask taught", rows)

# %%
figure, [axes] = pictures.sheet(1, 3)
pictures.panel(axes[0], weak, "kept by the filter", kept, named(kept.labels))
pictures.panel(axes[1], weak, "redrawn and corrected", final, named(final.labels))
pictures.panel(
    axes[2], weak, "the ground truth (never seen)", ground_truth, named(ground_truth["labels"])
)
pictures.show(figure, "9-ground-truth", "Pseudo-labels before and after, beside the ground truth")

# %% [markdown]
# "nothing" is also what lies on an instance that a better prediction has taken already, as in
# COCO's matching.
#
# *In this run* four classes of four instances are right in the end, and one was before; the three
# masks that SAM redrew of them are better ones. The fourth, #3, keeps the teacher's bad mask. And
# #4 is wrong before and after, in mask and class: nothing in the chain doubts it enough, for its c
# passes a threshold that starts low, and a gate of 0.5 lets a ragged mask through. One image proves
# nothing; docs/results.md has the averages.
#
# ## 16. What the validation images would have said
#
# The thresholds of section 3 follow class frequencies, the gate is 0.5, and the category classifier
# starts with half of the say: all three are guesses. With `--filter calibrated`, which is this
# project's and not the papers', they are measured instead: the same teacher, SAM and category
# classifier look at validation images, whose ground truth is known.
#
# *Thresholds.* The teacher is asked whether something is there, whatever it is: its foreground
# quality o is the probability of not being background. Classes are the correction's part. Of N
# predictions whose o reaches T, F lie on one of the M instances; the best T has the highest F1.
# Those of all classes are added to each class as if they had κ = 10 instances, so that a handful of
# images decides little:
#
# $$o = \sum_k P(k), \qquad
#   o \ge T^{\mathrm{found}}_k \;\wedge\; m \ge T^{\mathrm{mask}}_k$$
#
# ssis Eq. (found)
#
# $$\mathrm{F1}_k(T) = \frac{2 \, (F_k(T) + \lambda F(T))}
#   {N_k(T) + M_k + \lambda (N(T) + M)}, \qquad \lambda = \frac{\kappa}{M}, \qquad
#   T_k = \mathrm{argmax}_T \, \mathrm{F1}_k(T)$$
#
# ssis Eq. (F1)

# %%
stream = data.Stream(val_set, list(range(len(val_set))), settings.view_size, 2, True)
looked = [stream[k] for k in range(min(40, len(val_set)))]
# SAM's view of the validation images, which a calibrated run has.
labeler = labeler._replace(val_embeddings=Embeddings(embeddings.sam, val_set))
seen, images, instances = calibration.look(labeler, looked, settings)
found, quality = seen.true_labels > 0, seen.foreground
f_all, n_all = calibration.counts(quality, found)

# By hand, at some of the thresholds that are tried, for all classes together.
rows, total = [], instances.sum().item()
for k in range(0, len(calibration.TRIED), 10):
    threshold = calibration.TRIED[k].item()
    above = quality >= calibration.TRIED[k]
    n, f = above.sum().item(), (above & found).sum().item()
    assert (f, n) == (f_all[k].item(), n_all[k].item())
    rows.append((threshold, n, f, f / max(n, 1), f / total, 2 * f / (n + total)))
print(f"{len(seen)} predictions on {images} images, which have {total} instances")
table("T  N  F  precision  recall  F1", rows)

# %%
measured = calibration.found_thresholds(seen, instances)
table(
    "class  instances  predicted  found  T_k measured",
    [
        (
            name,
            instances[k].item(),
            (seen.labels == k + 1).sum().item(),
            (found & (seen.labels == k + 1)).sum().item(),
            measured[k],
        )
        for k, name in enumerate(names)
    ],
)

# %% [markdown]
# *Gate and trust*, over what passes these thresholds: what a gate would gain in mask IoU, and how
# likely the true classes are with each weight of the category classifier. A weight above one half
# has to be earned where the two disagree.
#
# $$G(g) = \frac{1}{N} \sum_{n : a_n \ge g}
#   (\mathrm{IoU}^{SAM}_n - \mathrm{IoU}^T_n)$$
#
# ssis Eq. (gate)
#
# $$w = \mathrm{argmax}_{w \in \{0, 0.1, \ldots, w_{\mathrm{max}}\}} \;
#   \sum_n \log p_{y_n}(w)$$
#
# ssis Eq. (trust)
#
# $$w_{\mathrm{max}} = 1 \;\mathrm{if}\; R_c - R_t > 2 \sqrt{R_c + R_t}, \;
#   \mathrm{else}\; \tfrac{1}{2}$$
#
# ssis Eq. (overrule)

# %%
passed = seen[seen.foreground >= measured[seen.labels - 1]]
gain = passed.refined_iou - passed.mask_iou
rows = [(g, (gain * (passed.agreement >= g)).sum().item() / max(1, len(gain)))
        for g in (0.0, 0.25, 0.5, 0.75, 0.9)]  # fmt: skip
table("g  G(g)", rows)
gate = calibration.best_gate(passed)
taken = (passed.agreement >= gate)[:, None]
passed.opinion = torch.where(taken, passed.refined_opinion, passed.opinion)
trust = calibration.best_trust(passed)
disagree, ours, theirs = calibration.disputed(passed[passed.true_labels > 0])
print(f"{disagree} named otherwise by the classifier: it is right in {ours}, "
      f"the teacher in {theirs}")  # fmt: skip
print(f"gate {gate:.2f}" if gate < calibration.OFF else "SAM is not asked", f"; w = {trust:.1f}")

# %% [markdown]
# *In this run* 84 % of what the teacher predicts above 0.3 lies on an instance, and 88 % of the
# instances are found, so hardly anything needs to be dropped: what is wrong are masks and classes.
# SAM's masks are better than the teacher's on the whole, and best without a gate; the true classes
# are most likely with a large weight of the category classifier, which the disputed instances
# allow. That is what the method assumes, and `calibrated` finds it by itself. On photographs it is
# otherwise (docs/log.md).
#
# ## What to do with it
#
# * Walk yourself: `python docs/scripts/walk.py`, or `docs/walk.ipynb` in Jupyter (`pip install
#   jupyter`); the notebook is empty until it is run.
# * Change a flag and walk again: `WALK_FLAGS="--refine iou --refine-gate 0"` chooses masks as S4M's
#   paper does, without a gate; `--tau-min 0.7` filters more, `--prototypes 4` remembers less.
# * Look at the same on many images: `pseudo_<step>.png` in each run's folder, and `measure` in
#   `ssis/report/audit.py`, which counts what section 15 shows.
# * Read `unlabeled_pass` in `train.py` again: every line of it was on this page.
