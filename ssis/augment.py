r"""Weak and strong views.

Consistency under augmentation drives teacher-student learning: the teacher sees an easy
*weak* view and must be right, the student sees a hard *strong* view of the same
image and must agree. What the two views may do follows from that:

* weak = resize and horizontal flip only. It is geometric, so the pseudo-labels are
  predicted in the very frame in which the student is trained.
* strong = photometric only: jitter of colour, gray, blur. Pixels keep their place,
  hence the pseudo-labels stay valid without being touched.

GD (arXiv 2308.02668), section 4: ColorJitter(0.4, 0.4, 0.4, 0.1) with probability 0.8,
grayscale 0.2, Gaussian blur of sigma 0.1 to 2.0 with probability 0.5.

Every view has a seed of its own, so a run does not depend on how the images are spread
over workers and processes. Read next: `ssis/teacher.py`, who looks at the weak view.
"""

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

NEAREST_EXACT = v2.InterpolationMode.NEAREST_EXACT
# GD section 4, in the order of its text. The kernel spans about three sigmas.
STRONG = v2.Compose(
    [
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomGrayscale(p=0.2),
        v2.RandomApply([v2.GaussianBlur(kernel_size=13, sigma=(0.1, 2.0))], p=0.5),
    ]
)


def weak_view(image: Tensor, target: dict | None, config, seed: int):
    """Resize to a random short side and flip with probability one half.

    Args:
        image: (3, H, W) uint8, original frame.
        target: `labels` (N,) and `masks` (N, H, W) uint8, or None.
        config: `short_side_min`, `short_side`, `long_side`, pixels.
        seed: of this view.

    Returns:
        image (3, h, w) float32 in [0, 1], and the target with its masks in that frame.
        Masks may have become empty: `data.sanitize` comes next.
    """
    generator = torch.Generator().manual_seed(seed)
    short = torch.randint(
        config.short_side_min, config.short_side + 1, (), generator=generator
    ).item()
    flip = torch.rand((), generator=generator).item() < 0.5
    image = resize(image, short, config.long_side)
    if target is not None:
        target = dict(target, masks=resize_masks(target["masks"], image))
    if flip:
        image = F.horizontal_flip(image)
        target = target and dict(target, masks=target["masks"].flip(-1))
    return F.to_dtype(image, torch.float32, scale=True), target


def resize(image: Tensor, short: int, longest: int) -> Tensor:
    """Short side to `short`, unless the long side would pass `longest`.

    Without antialiasing, as torchvision's own Mask R-CNN resizes: its published weights
    are used to such pixels. A strip is not made narrower than 16 pixels.
    """
    height, width = image.shape[-2:]
    scale = min(short / min(height, width), longest / max(height, width))
    size = [max(16, round(height * scale)), max(16, round(width * scale))]
    return image if size == [height, width] else F.resize(image, size, antialias=False)


def resize_masks(masks: Tensor, image: Tensor) -> Tensor:
    """Masks (N, H, W) to the size of a resized image.

    Nearest neighbour, for a mask must stay 0 or 1; the exact one, since plain NEAREST
    rounds down and so shifts masks against pixels by half a pixel.
    """
    return F.resize(masks, list(image.shape[-2:]), NEAREST_EXACT)


def strong_view(image: Tensor, seed: int) -> Tensor:
    """The photometric distortion of one image.

    Args:
        image: (3, H, W) float in [0, 1], a weak view, on any device.
        seed: of this view. torchvision draws from the global generator, so that one is
            put aside meanwhile.

    Returns:
        (3, H, W) float in [0, 1], every pixel in its place.
    """
    with torch.random.fork_rng(devices=[]):
        # Only this one: `torch.manual_seed` would also reseed the GPUs', for good.
        torch.default_generator.manual_seed(seed)
        return STRONG(image)
