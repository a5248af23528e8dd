r"""S4M: pseudo-label refinement (PR) by prompting SAM.

A teacher trained on few labels finds objects better than it outlines them. SAM outlines
anything that it is pointed at. So SAM draws the mask again, and the teacher's class and
class quality stay (S4M, section on pseudo-label refinement):

1. *Points.* K = 3 pixels of each instance are drawn, without replacement, with
   probability

$$P(x) \propto p(x) \; \text{inside} \; \{p > 0.5\}$$ S4M Eq. (PR sampling)

   with p the teacher's mask probability: points lie where the teacher is most confident
   that the object is. The released code draws from a softmax over the logits z of the
   whole map instead, $P(x) \propto e^{z(x)}$, which is proportional to p / (1 - p):
   then almost all points lie where p is nearly 1. (It takes the logits themselves:
   beyond 17 all probabilities are rounded to 1.)

2. *Candidates.* SAM is prompted with these points, all positive, and answers with three
   masks, since a point may mean a part or a whole. For each it predicts its IoU with
   the object that is meant: the *predicted IoU*.

3. *Choice.* The paper takes the candidate k with the highest predicted IoU,

$$k^* = \mathrm{argmax}_k \; \widehat{\mathrm{IoU}}_k$$ S4M Eq. (PR choice)

S4M's refinement ends here. Three parts more are *this project's*, each with a switch;
of the presets, `full` has them, and `s4m` is as published:

* *Instance-level matching* takes the candidate that agrees best with the teacher's
  mask: SAM knows edges, but only the teacher knows whether a part, an object or a group
  is meant.

* *Gate.* The candidate is taken only if its IoU with the teacher's mask reaches
  `refine_gate`, or what `ssis/calibration.py` measures instead (`--filter calibrated`,
  as in `full`); otherwise the teacher's mask stays. S4M has no gate, and at COCO 10 %,
  where the teacher is already good, it is slightly below Guided Distillation (34.6
  against 35.0).

* *Dynamic confidence calibration.* Two models as different as SAM and the teacher
  seldom make the same mistake, so their agreement says how good the mask is:

$$m' = m \cdot \mathrm{IoU}(M_{SAM}, M_T)$$ ssis Eq. (calibration)

  The mask loss of the instance is then weighted by m'.

SAM works in the original frame, on the one embedding of the image. The points are
mapped to that frame, and the masks back to the view (`augment.Geometry`).

Chain: 12 of 24. Read next: `ssis/correction.py`, which doubts the classes.
"""

import dataclasses

import torch
from torch import Tensor

from ssis.sam import CHUNK
from ssis.inference import paste
from ssis.io.embeddings import Embeddings
from ssis.targets import boxes_of, mask_iou
from ssis.teacher import PseudoLabels, mask_quality


def point_weights(pseudo: PseudoLabels, rule: str) -> Tensor:
    """How likely each pixel is to become a prompt.

    Args:
        pseudo: of one image, with masks of the teacher.
        rule: "paper" or "code"; see the module's text.

    Returns:
        (N, H, W) float >= 0; proportional to the probability.

    Raises:
        ValueError: an unknown rule.
    """
    if rule == "paper":
        # S4M Eq. (PR sampling)
        return pseudo.mask_probs * (pseudo.mask_probs > 0.5)
    if rule == "code":
        # The logits in the frame of the view. Outside of the box there are none: no
        # point is drawn there.
        size, boxes = pseudo.masks.shape[1:], pseudo.feature_boxes
        logits = paste(pseudo.mask_logits, boxes, size)
        inside = paste(torch.ones_like(pseudo.mask_logits), boxes, size) > 0
        logits = logits.masked_fill(~inside, -torch.inf)
        return logits.flatten(1).softmax(dim=1).view_as(logits)
    raise ValueError(f"no sampling rule {rule!r}: paper or code")


def sample_points(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Prompts for some instances of a view.

    Args:
        weights: (N, H, W) float >= 0, of `point_weights`, none all 0.
        count: K; where a mask has fewer pixels, some points coincide.
        generator: on the device of `weights`.

    Returns:
        (N, K, 2) float32, x and y in the view; the first pixel's center is 0.5.
    """
    # One distribution over all pixels for each instance.
    width, weights = weights.shape[2], weights.flatten(1)  # (N, H * W)
    if not len(weights):
        return torch.zeros(0, count, 2, device=weights.device)
    # A race: each pixel arrives after a time drawn from Exp(weight), and the first K
    # are K draws without replacement. (`multinomial` does the same, but checks the
    # weights first, and so waits for a GPU.) A mask may have fewer than K pixels, so
    # every pixel gets a tiny weight. If a pixel outside of the mask arrives, the first
    # one takes its place, or the likeliest pixel if that is outside as well.
    times = torch.empty_like(weights).exponential_(generator=generator)
    index = ((weights + 1e-12) / times).topk(count).indices  # (N, K)
    empty = weights.gather(1, index) == 0
    best = weights.argmax(dim=1, keepdim=True)
    index = torch.where(empty, torch.where(empty[:, :1], best, index[:, :1]), index)
    # From the number of a pixel to its center, x before y as SAM wants it.
    return torch.stack([index % width, index // width], dim=2).float() + 0.5


def choose(
    logits: Tensor, predicted_iou: Tensor, masks: Tensor, rule: str
) -> tuple[Tensor, Tensor]:
    """One of SAM's candidates for each instance.

    Args:
        logits: (N, 3, H, W), in the view.
        predicted_iou: (N, 3), SAM's own estimate for each.
        masks: (N, H, W) bool, the teacher's.
        rule: "iou" or "agreement".

    Returns:
        logits (N, H, W) of the chosen one, and its IoU with the teacher's mask (N,).

    Raises:
        ValueError: an unknown rule.
    """
    if rule not in ("iou", "agreement"):
        raise ValueError(f"no rule of choice {rule!r}: iou or agreement")
    # A logit above 0 is a probability above one half.
    agreement = mask_iou(logits > 0, masks[:, None])  # (N, 3)
    # S4M Eq. (PR choice), or this project's instance-level matching.
    best = (predicted_iou if rule == "iou" else agreement).argmax(dim=1)
    rows = torch.arange(len(best), device=best.device)
    return logits[rows, best], agreement[rows, best]


@torch.no_grad()
def refine(
    pseudo: PseudoLabels,
    embeddings: Embeddings,
    item: dict,
    rule: str,
    points: int,
    sampling: str,
    gate: float,
    calibrate: bool,
    min_area: int,
) -> PseudoLabels:
    """Pseudo-labels with masks redrawn by SAM; classes and order stay.

    Args:
        pseudo: of one image, in its weak view.
        embeddings: SAM's, of the image's dataset.
        item: the image's item of `data.Stream`: `index`, `geometry`, and `seed`, which
            decides the points.
        rule: of `choose`.
        points: K, prompts of each instance.
        sampling: of `point_weights`.
        gate, calibrate, min_area: of `apply_gate`.
    """
    if not len(pseudo):
        return pseudo
    # The points depend on the seed of the view alone. So they are the same in a resumed
    # run, and whatever other images are in the batch.
    sam, geometry, device = embeddings.sam, item["geometry"], pseudo.masks.device
    embedding = embeddings[item["index"]]
    generator = torch.Generator(device).manual_seed(item["seed"])
    parts = []
    # A few at a time: three candidates in 1024 x 1024 are 12 MB an instance. Where a
    # view is a crop of a larger image, they are first as large as that.
    height, width = geometry.scaled
    few = max(1, min(CHUNK, CHUNK * 1024**2 // (height * width)))
    for chunk in torch.arange(len(pseudo), device=device).split(few):
        some = pseudo[chunk]
        prompts = sample_points(point_weights(some, sampling), points, generator)
        prompts = geometry.to_original(prompts)
        # Candidates have the scale of the view; `to_view` crops and mirrors them as the
        # view was, so that they can be compared with the teacher's masks.
        answer = sam.candidates(embedding, prompts, geometry.original, geometry.scaled)
        parts.append(choose(geometry.to_view(answer[0]), answer[1], some.masks, rule))
    logits, agreement = (torch.cat(part) for part in zip(*parts, strict=True))
    return apply_gate(pseudo, logits, agreement, gate, calibrate, min_area)


def apply_gate(
    pseudo: PseudoLabels,
    logits: Tensor,
    agreement: Tensor,
    gate: float,
    calibrate: bool,
    min_area: int,
) -> PseudoLabels:
    """Gate and calibration: SAM's masks where they are taken, else the teacher's.

    Args:
        pseudo: of one image.
        logits: (N, H, W), the chosen candidates.
        agreement: (N,), their IoU with the teacher's masks.
        gate: agreement from which SAM's mask is taken, in [0, 1].
        calibrate: set the mask quality to m' of ssis Eq. (calibration).
        min_area: pixels; SAM's mask needs more.
    """
    redrawn = logits.sigmoid()
    # The gate. And a mask of a few pixels is not taken, as in `filters.keep`.
    enough = (redrawn > 0.5).flatten(1).sum(dim=1) > min_area
    taken = (agreement >= gate) & enough
    # Mask, quality and box change together or not at all: a box that does not fit its
    # mask would teach the student two different objects.
    soft = torch.where(taken[:, None, None], redrawn, pseudo.mask_probs)
    masks = soft > 0.5
    quality = torch.where(taken, mask_quality(soft), pseudo.mask_quality)
    if calibrate:
        # ssis Eq. (calibration): for all instances. Where the teacher's mask was kept,
        # SAM saw something else, which is a reason for doubt too.
        quality = pseudo.mask_quality * agreement
    boxes = torch.where(taken[:, None], boxes_of(masks), pseudo.boxes)
    return dataclasses.replace(
        pseudo, boxes=boxes, masks=masks, mask_probs=soft, mask_quality=quality
    )
