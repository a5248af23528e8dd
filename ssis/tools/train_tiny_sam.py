r"""The tiny SAM: Segment Anything's own parts, small, trained on scenes of no class.

The built-in dataset needs something that plays SAM's part within seconds on a CPU: a
model that knows what an object is and where it ends, and nothing about classes. The
official models are a hundred times too large for that, so this one is built from
`segment_anything.modeling` (image encoder, prompt encoder, mask decoder; a frame of 96
pixels, patches of 6, masks of 64 x 64) and trained here, on scenes that are *not* the
built-in dataset: random polygons, blobs, spiked outlines, plates with holes, in any
rotation, with textures of their own. It is never told which kind an object is.

Training is SAM's own (Kirillov et al., arXiv 2304.02643, section 3): a prompt of one to
three points on an object; three candidate masks, of which only the best is trained,
since a point may mean a part or a whole; a head that predicts each candidate's IoU.

$$L = \min_k (20 \, L_{focal}^k + L_{dice}^k) + \mathrm{MSE}(IoU, \hat{IoU})$$
SAM (train)

Two things are not SAM's. Three of ten scenes draw their prompts from blurred masks, so
that some points miss the object by a pixel or two: later the prompts come from a
teacher's mask, which is not exact. And the encoder is told directly which patches
belong together (`grouping`): minutes instead of days are too short to learn that
through the decoder.

    torchrun --nproc_per_node 2 -m ssis sam --out tiny_sam.pt --minutes 40

Read next: `ssis/sam.py`, which loads it.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

from ssis import UserError, distributed
from ssis import sam as sam_module
from ssis.io import program
from ssis.io.files import whole

SIDE, PATCH = 96, 6
LR, WARMUP = 1e-3, 200
# Prompts of one image in a step; smallest object, as a fraction of the image's area.
PROMPTS, SMALLEST = 4, 0.004


# ----------------------------------------------------------------------------- scenes


def outline(rng: np.random.RandomState, angle: np.ndarray, kind: int) -> np.ndarray:
    """The radius, about 1, of a random outline in each direction.

    Args:
        rng: source of randomness.
        angle: radians, any shape.
        kind: 0 a blob, 1 any polygon, 2 a nearly regular one, 3 one with spikes.

    Raises:
        ValueError: another kind.
    """
    if kind == 0:
        # A few waves around a circle.
        radius = np.ones_like(angle)
        for k in range(1, 6):
            wave = np.cos(k * angle + 2 * math.pi * rng.rand())
            radius += rng.normal(0, 0.22 / k) * wave
        return radius.clip(0.25, 1.6)
    if kind == 1:
        corners = rng.rand(rng.randint(3, 9)) * 2 * math.pi
        lengths = rng.uniform(0.55, 1.25, len(corners))
    elif kind == 2:
        n = rng.randint(3, 8)
        corners = (np.arange(n) + rng.normal(0, 0.08, n)) / n * 2 * math.pi
        lengths = rng.uniform(0.9, 1.15, n)
    elif kind == 3:
        # Corners alternately far and near, in any number and depth.
        n = 2 * rng.randint(3, 9)
        corners = (np.arange(n) + rng.normal(0, 0.1, n)) / n * 2 * math.pi
        lengths = np.where(np.arange(n) % 2, rng.uniform(0.3, 0.7), 1.15)
        lengths = lengths * rng.uniform(0.9, 1.1, n)
    else:
        raise ValueError(f"no outline of kind {kind!r}")
    order = np.argsort(corners % (2 * math.pi))
    corners, lengths = (corners % (2 * math.pi))[order], lengths[order]
    # The straight line through the corners before and after, in polar form.
    after = np.searchsorted(corners, angle % (2 * math.pi)) % len(corners)
    before = (after - 1) % len(corners)
    a1, a2, r1, r2 = corners[before], corners[after], lengths[before], lengths[after]
    span = (a2 - a1) % (2 * math.pi)
    part = (angle - a1) % (2 * math.pi)
    bottom = r1 * np.sin(part) + r2 * np.sin(span - part)
    line = r1 * r2 * np.sin(span) / np.where(np.abs(bottom) < 1e-3, 1e-3, bottom)
    # No straight line spans half a turn or more: an arc there.
    return np.where(span < 2.8, line, np.minimum(r1, r2)).clip(0.15, 1.6)


def surface(rng: np.random.RandomState, side: int) -> np.ndarray:
    """A texture (side, side, 3) float: gradient, waves, patches or plain."""
    y, x = np.mgrid[:side, :side] / side
    color, other = rng.uniform(10, 245, (2, 3))
    kind, turn = rng.randint(4), 2 * math.pi * rng.rand()
    along = x * math.cos(turn) + y * math.sin(turn)
    if kind == 0:
        blend = along - along.min()
    elif kind == 1:
        wave = np.sin(2 * math.pi * along * rng.uniform(4, 30))
        blend = (wave > 0) if rng.rand() < 0.5 else (wave + 1) / 2
    elif kind == 2:
        period = rng.randint(3, 16)
        coarse = rng.rand(side // period + 2, side // period + 2)
        blend = np.kron(coarse, np.ones((period, period)))[:side, :side]
    else:
        blend = np.zeros((side, side))
    return color + (rng.uniform(0, 0.5) * blend)[..., None] * (other - color)


def scene(rng: np.random.RandomState, side: int) -> tuple[np.ndarray, np.ndarray]:
    """A scene of 2 to 5 objects of all outlines.

    Args:
        rng: source of randomness.
        side: of the image, pixels.

    Returns:
        image (side, side, 3) uint8, and the visible masks (N, side, side) bool.
    """
    image, masks = surface(rng, side), []
    y, x = np.mgrid[:side, :side] + 0.5
    for _ in range(rng.randint(2, 6)):
        cx, cy = rng.uniform(0.0, 1.0, 2) * side
        stretch, turn = rng.uniform(0.6, 1.0), math.pi * rng.rand()
        across = (x - cx) * math.cos(turn) + (y - cy) * math.sin(turn)
        down = ((y - cy) * math.cos(turn) - (x - cx) * math.sin(turn)) / stretch
        angle = np.arctan2(down, across)
        distance = np.hypot(across, down) / (side * rng.uniform(0.07, 0.3))
        mask = distance < outline(rng, angle, rng.randint(4))
        if rng.rand() < 0.15:
            # A plate with a hole: what is seen through the hole is not the object.
            mask &= distance > rng.uniform(0.3, 0.6)
        image = np.where(mask[..., None], surface(rng, side), image)
        masks = [old & ~mask for old in masks] + [mask]
    image = image + rng.normal(0, rng.uniform(0, 10), image.shape)
    masks = [mask for mask in masks if mask.sum() >= SMALLEST * side**2]
    return image.clip(0, 255).astype(np.uint8), np.array(masks, bool)


# --------------------------------------------------------------------------- training


def draw_points(masks: Tensor, count: int, blurred: bool) -> Tensor:
    """`count` random pixels of each mask: (N, count, 2) float, x and y.

    Args:
        masks: (N, side, side) bool, none of them empty.
        count: points of each mask; they may coincide.
        blurred: draw a pixel with the mean of the mask in the 5 x 5 pixels around it as
            its weight, instead of the mask itself.
    """
    weights = masks.float()
    if blurred:
        weights = F.avg_pool2d(weights[None], 5, stride=1, padding=2)[0]
    chosen = torch.multinomial(weights.flatten(1), count, replacement=True)
    return torch.stack([chosen % masks.shape[2], chosen // masks.shape[2]], 2).float()


def candidates(sam: Sam, embedding: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Three mask logits (N, 3, side, side) for each prompt, and their IoU (N, 3).

    Args:
        sam: the model.
        embedding: (1, D, cells, cells).
        points: (N, K, 2), pixels of the frame, all of them positive prompts.
    """
    ones = torch.ones(points.shape[:2], dtype=torch.int64)
    sparse, dense = sam.prompt_encoder((points, ones), None, None)
    positions = sam.prompt_encoder.get_dense_pe()
    low, iou = sam.mask_decoder(embedding, positions, sparse, dense, True)
    side = (sam.image_encoder.img_size,) * 2
    return sam.postprocess_masks(low.float(), side, side), iou.float()


def mask_losses(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each candidate and its true IoU, both (N, 3).

    Args:
        logits: (N, 3, side, side).
        masks: (N, side, side) bool, the ground truth.
    """
    target = masks[:, None].expand_as(logits).float()
    probs = logits.sigmoid()
    cross = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    # Focal loss: a pixel that is almost right already counts little.
    right = probs * target + (1 - probs) * (1 - target)
    focal = (cross * (1 - right) ** 2).mean(dim=(2, 3))
    both = (probs * target).sum(dim=(2, 3))
    dice = 1 - (2 * both + 1) / (probs.sum(dim=(2, 3)) + target.sum(dim=(2, 3)) + 1)
    hard, true = logits > 0, target > 0.5
    iou = (hard & true).sum(dim=(2, 3)) / (hard | true).sum(dim=(2, 3)).clamp(min=1)
    # SAM (train)
    return 20 * focal + dice, iou


def grouping(embedding: Tensor, masks: Tensor) -> Tensor:
    """Do two patches lie on the same object? A scalar loss on the encoder.

    For 128 random patches against all patches, the answer is read from the cosine of
    the two embeddings; the background counts as one more object.

    Args:
        embedding: (D, cells, cells).
        masks: (N, side, side) bool, disjoint.
    """
    patch = masks.shape[-1] // embedding.shape[-1]
    cells = F.avg_pool2d(masks.float()[None], patch)[0].flatten(1)  # (N, cells^2)
    # The object that covers most of a cell; 0 is the background.
    owner = torch.cat([1 - cells.sum(dim=0, keepdim=True), cells]).argmax(dim=0)
    some = torch.randperm(len(owner))[:128]
    direction = F.normalize(embedding.flatten(1).T, dim=1)  # (cells^2, D)
    # A cosine is in [-1, 1], and a sigmoid of that never leaves [0.27, 0.73]: no answer
    # could be sure. Times 10, less 5, the answer changes at a cosine of 0.5 (logit 0);
    # equal directions are a sure yes (logit 5, probability 0.993), and orthogonal ones
    # already a sure no (-5, 0.007). So patches of different objects need not be
    # opposites, which no three objects could be of one another.
    logits = 10 * direction[some] @ direction.T - 5
    same = (owner[some][:, None] == owner[None]).float()
    # Both answers weigh the same, however much of the image is background.
    fraction = same.mean().clamp(0.01, 0.99)
    weight = same * 0.5 / fraction + (1 - same) * 0.5 / (1 - fraction)
    return F.binary_cross_entropy_with_logits(logits, same, weight)


def image_loss(sam: Sam, embedding: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of one scene, and the mean IoU of the candidates that it would choose."""
    loss = grouping(embedding, masks)
    chosen = masks[torch.randperm(len(masks))[:PROMPTS]]
    count, blurred = int(torch.randint(1, 4, ())), torch.rand(()).item() < 0.3
    with torch.autocast("cpu", torch.bfloat16):
        points = draw_points(chosen, count, blurred)
        logits, predicted = candidates(sam, embedding[None], points)
    losses, iou = mask_losses(logits, chosen)
    quality = iou.gather(1, predicted.argmax(dim=1, keepdim=True)).mean()
    # SAM (train)
    return loss + losses.min(dim=1).values.mean() + F.mse_loss(predicted, iou), quality


def start_from(sam: Sam, path: Path) -> None:
    """Load the weights of a tiny SAM with another frame into this one.

    Args:
        sam: new, with the same patch.
        path: checkpoint that `train` wrote.

    Raises:
        UserError: not such a file, or one of another patch.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        state, patch = saved["model"], saved["patch"]
    # Every exception: a damaged file can make the reader fail in any way.
    except Exception as error:
        raise UserError(f"--weights {path}: not a tiny SAM's checkpoint") from error
    if patch != sam.image_encoder.patch_embed.proj.kernel_size[0]:
        raise UserError(
            f"--weights {path}: has patches of {patch}; add --patch {patch}"
        )
    # All weights fit a frame of any size, but the positions: one vector for each cell.
    positions = state["image_encoder.pos_embed"].float().permute(0, 3, 1, 2)
    size = sam.image_encoder.pos_embed.shape[1:3]
    positions = F.interpolate(positions, size, mode="bicubic", antialias=True)
    state["image_encoder.pos_embed"] = positions.permute(0, 2, 3, 1)
    sam.load_state_dict(state)


def train(
    out: Path,
    minutes: float,
    seed: int = 0,
    side: int = SIDE,
    patch: int = PATCH,
    weights: Path | None = None,
) -> None:
    """Train for some minutes, 8 scenes a step on each process; write the checkpoint.

    Args:
        out: the checkpoint.
        minutes: time to train; the learning rate follows the clock, not the step.
        seed: of weights and scenes.
        side: of the frame, pixels.
        patch: side of a patch, pixels; it divides `side`.
        weights: checkpoint to start from; None: random weights.

    Raises:
        UserError: `weights` cannot be used.
    """
    rank, world, _ = distributed.start("cpu")
    torch.manual_seed(seed)
    sam = sam_module.build_tiny(side, patch)
    if weights:
        start_from(sam, weights)
    rng = np.random.RandomState([seed, rank])
    torch.manual_seed(seed * 1000 + rank)
    optimizer = torch.optim.AdamW(sam.parameters(), lr=LR, weight_decay=0.05)
    began, step, quality, progress = time.monotonic(), 0, 0.0, 0.0
    while progress < 1:
        scenes = []
        while len(scenes) < 8:
            image, masks = scene(rng, side)
            if len(masks):
                scenes.append((torch.as_tensor(image), torch.as_tensor(masks)))
        images = torch.stack([image for image, _ in scenes]).permute(0, 3, 1, 2)
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = sam.image_encoder(sam.preprocess(images))
        parts = [
            image_loss(sam, embedding, masks)
            for embedding, (_, masks) in zip(embeddings.float(), scenes, strict=True)
        ]
        optimizer.zero_grad()
        (sum(loss for loss, _ in parts) / len(parts)).backward()
        # Parts of the prompt encoder (boxes, mask prompts) are never used.
        used = [p for p in sam.parameters() if p.grad is not None]
        if world > 1:
            together = parameters_to_vector([p.grad for p in used])
            dist.all_reduce(together)
            sizes = [p.numel() for p in used]
            for p, grad in zip(used, (together / world).split(sizes), strict=True):
                p.grad = grad.view_as(p)
        nn.utils.clip_grad_norm_(used, 1.0)
        # By rank 0's clock: a warm-up, then half a cosine to the end of the time.
        progress = (time.monotonic() - began) / (60 * minutes)
        progress = distributed.from_main(lambda progress=progress: progress)
        rate = min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = LR * max(rate, 0.0)
        optimizer.step()
        step += 1
        total = sum(iou.item() for _, iou in parts)
        quality = 0.98 * quality + 0.02 * total / len(parts)
        if rank == 0 and step % 100 == 0:
            print(
                f"step {step}, {60 * minutes * progress:.0f} s: IoU of the chosen "
                f"candidate {quality / (1 - 0.98**step):.3f}",
                flush=True,
            )
    if rank == 0:
        # 16 bits are enough for its use, and halve the file.
        state = {name: value.half() for name, value in sam.state_dict().items()}
        with whole(out) as temporary:
            torch.save(dict(side=side, patch=patch, model=state), temporary)
    distributed.stop()


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ssis sam",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="checkpoint to write")
    parser.add_argument("--minutes", type=float, default=40, help="time to train")
    parser.add_argument("--seed", type=int, default=0, help="of weights and scenes")
    parser.add_argument("--side", type=int, default=SIDE, help="of the frame, pixels")
    parser.add_argument("--patch", type=int, default=PATCH, help="divides the side")
    parser.add_argument(
        "--weights",
        type=Path,
        help="tiny SAM to go on from, of the same patch and any frame "
        "(ssis/tiny_sam.pt): saves most of the time",
    )
    args = parser.parse_args(argv)
    frame = (args.side, args.patch)
    try:
        train(args.out, args.minutes, args.seed, *frame, args.weights)
    except UserError as error:
        program.give_up(error)
