r"""S4M: pseudo-label refinement (PR) by prompting SAM.

A teacher of few labels finds an object better than it outlines it. SAM outlines
anything that it is pointed at. So SAM draws the mask again, and the teacher's class and
score stay (S4M, section on pseudo-label refinement):

1. *Points.* K = 3 pixels of each instance are drawn, without replacement, with chance

$$P(x) \propto p(x) \; \text{inside} \; \{p > 0.5\}$$ S4M Eq. (PR sampling)

   p being the teacher's mask probability: where it is surest, the object surely is. The
   released code draws from a softmax over the logits of the whole map instead, which is
   proportional to p / (1 - p): almost all points then lie where p is nearly 1.

2. *Candidates.* SAM is prompted with these points, all positive, and answers with three
   masks (a point may mean a part or a whole), each with the IoU that it expects.

3. *Choice.* The paper takes the candidate k with the highest expected IoU,

$$k^* = \mathrm{argmax}_k \; \widehat{\mathrm{IoU}}_k$$ S4M Eq. (PR choice)

   The alternative, instance-level matching, takes the one that agrees best with the
   teacher's mask: SAM knows edges, but only the teacher knows which of part, object and
   group is meant.

4. *Gate.* The candidate is taken only if its IoU with the teacher's mask reaches
   `refine_gate`; otherwise the teacher's mask stays. 0 is the paper, which has no gate
   and loses to its own baseline where the teacher is good already (COCO 10 %).

5. *Calibration.* How far two so different observers agree says how good the mask is:

$$m' = m \cdot \mathrm{IoU}(M_{SAM}, M_T)$$ S4M Eq. (calibration)

   and the mask loss of the instance is weighted by m'. The paper's summary speaks of
   confidence calibration; the formula is this project's.

SAM works in the original frame, on the one embedding of the image; the points travel
there and the masks travel back (`augment.Geometry`). Read next: `ssis/augment.py`,
which pastes what comes out here onto other images.
"""

import dataclasses

import torch
from torch import Tensor

from ssis import data
from ssis.sam import CHUNK, Embeddings
from ssis.teacher import PseudoLabels, mask_quality


def sample_points(
    mask_probs: Tensor, count: int, rule: str, generator: torch.Generator
) -> Tensor:
    """Prompts for some instances of a view.

    Args:
        mask_probs: (N, H, W) float in [0, 1], none without a pixel above 0.5.
        count: K; where a mask has fewer pixels, some points coincide.
        rule: "paper" or "code"; see the module's text.
        generator: on the device of `mask_probs`.

    Returns:
        (N, K, 2) float32, x and y in the view; the first pixel's center is 0.5.
    """
    if rule == "paper":
        # S4M Eq. (PR sampling)
        chance = mask_probs * (mask_probs > 0.5)
    else:
        # softmax(logit p) = p / (1 - p), normalized
        chance = mask_probs / (1 - mask_probs).clamp(min=1e-6)
    # One distribution over all pixels for each instance; multinomial scales it itself.
    chance = chance.flatten(1)  # (N, H * W)
    if not len(chance):
        return torch.zeros(0, count, 2, device=chance.device)
    # The least of chances for every pixel, so that there are K to draw; one that got in
    # by it stands for nothing and is replaced by the first draw, or, if that got in so
    # as well, by the likeliest pixel.
    place = torch.multinomial(chance + 1e-12, count, generator=generator)  # (N, K)
    empty = chance.gather(1, place) == 0
    best = chance.argmax(dim=1, keepdim=True)
    place = torch.where(empty, torch.where(empty[:, :1], best, place[:, :1]), place)
    # Pixel number to the center of the pixel, x before y as SAM wants it.
    width = mask_probs.shape[2]
    return torch.stack([place % width, place // width], dim=2).float() + 0.5


def overlap(masks: Tensor, other: Tensor) -> Tensor:
    """IoU of masks, pair by pair.

    Args:
        masks: (.., H, W) bool.
        other: (.., H, W) bool; the leading sides are broadcast.

    Returns:
        (..) in [0, 1]; 0 where both are empty.
    """
    # Pixels of both over pixels of either. Not over those of one of them: a mask that
    # covers the whole image would then agree with everything.
    both = (masks & other).flatten(-2).sum(dim=-1)
    return both / (masks | other).flatten(-2).sum(dim=-1).clamp(min=1)


def choose(
    logits: Tensor, expected: Tensor, masks: Tensor, rule: str
) -> tuple[Tensor, Tensor]:
    """One of SAM's candidates for each instance.

    Args:
        logits: (N, 3, H, W), in the view.
        expected: (N, 3), the IoU that SAM expects of each.
        masks: (N, H, W) bool, the teacher's.
        rule: "iou" or "agreement".

    Returns:
        logits (N, H, W) of the chosen one, and its IoU with the teacher's mask (N,).
    """
    # A logit above 0 is a probability above one half.
    agreement = overlap(logits > 0, masks[:, None])  # (N, 3)
    # S4M Eq. (PR choice), or instance-level matching: who is asked which one is meant.
    best = (expected if rule == "iou" else agreement).argmax(dim=1)
    rows = torch.arange(len(best), device=best.device)
    return logits[rows, best], agreement[rows, best]


@torch.no_grad()
def refine(
    pseudo: PseudoLabels, embeddings: Embeddings, item: dict, config
) -> PseudoLabels:
    """Pseudo-labels whose masks SAM has redrawn; classes and order stay.

    Args:
        pseudo: of one image, in its weak view.
        embeddings: SAM's, of the dataset that the image is of.
        item: the image's, of `data.Stream`: `index`, `geometry`, and the `seed` from
            which the points follow.
        config: `refine` ("iou" or "agreement"), `refine_points`, `refine_sampling`,
            `refine_gate`, `refine_calibrate`.
    """
    if not len(pseudo):
        return pseudo
    # The points follow from the seed of the view alone: the same in a resumed run, and
    # whatever other images are in the batch.
    sam, geometry, device = embeddings.sam, item["geometry"], pseudo.masks.device
    embedding = embeddings[item["index"]]
    generator = torch.Generator(device).manual_seed(item["seed"])
    parts = []
    # A few at a time: three candidates in 1024 x 1024 are 12 MB an instance.
    for soft, masks in zip(
        pseudo.mask_probs.split(CHUNK), pseudo.masks.split(CHUNK), strict=True
    ):
        points = geometry.to_original(
            sample_points(soft, config.refine_points, config.refine_sampling, generator)
        )
        # Candidates come back in the size of the view, so that they can be compared
        # with the teacher's mask; mirrored where the view is.
        answer = sam.candidates(embedding, points, geometry.original, geometry.view)
        parts.append(
            choose(geometry.to_view(answer[0]), answer[1], masks, config.refine)
        )
    logits, agreement = (torch.cat(part) for part in zip(*parts, strict=True))
    return gated(pseudo, logits, agreement, config)


def gated(
    pseudo: PseudoLabels, logits: Tensor, agreement: Tensor, config
) -> PseudoLabels:
    """Gate and calibration: SAM's masks where they are taken, else the teacher's.

    Args:
        pseudo: of one image.
        logits: (N, H, W), the chosen candidates.
        agreement: (N,), their IoU with the teacher's masks.
        config: `refine_gate`, `refine_calibrate`, `min_area`.
    """
    redrawn = logits.sigmoid()
    # The gate; and a few pixels are no mask, whatever the gate (see `filters.keep`).
    enough = (redrawn > 0.5).flatten(1).sum(dim=1) > config.min_area
    taken = (agreement >= config.refine_gate) & enough
    # Mask, quality and box change together or not at all: a box that is not its mask's
    # would teach the student two different objects.
    soft = torch.where(taken[:, None, None], redrawn, pseudo.mask_probs)
    masks = soft > 0.5
    quality = torch.where(taken, mask_quality(soft), pseudo.mask_quality)
    if config.refine_calibrate:
        # S4M Eq. (calibration): of all, also of those that kept the teacher's mask.
        # That SAM sees something else there is a reason for doubt as well.
        quality = pseudo.mask_quality * agreement
    boxes = torch.where(taken[:, None], data.boxes_of(masks), pseudo.boxes)
    return dataclasses.replace(
        pseudo, boxes=boxes, masks=masks, mask_probs=soft, mask_quality=quality
    )
