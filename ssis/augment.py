r"""Weak and strong views of an image.

Consistency under augmentation drives teacher-student learning: the teacher sees an easy
*weak* view and must be right, the student sees a hard *strong* view of the same
image and must agree. What the two views may do follows from that:

* weak = resize, crop and horizontal flip. These are geometric. The student's view is
  made from the weak view, so the pseudo-labels are already in the student's frame.
* strong = photometric only: jitter of color, gray, blur. No pixel moves, so the
  pseudo-labels need no change.

The papers' weak views: on COCO *large-scale jitter*, crops of 1024 x 1024 pixels of
images resized to 0.1 to 2 times what fits into the crop; on Cityscapes crops of 512 x
1024 of images with a short side of 512 to 2048, with the color distortion of SSD in
every view, the teacher's too (S4M's code leaves it out of the student's). The built-in
data have neither crops nor distortion.

The strong view, GD (arXiv 2308.02668), section 4: ColorJitter(0.4, 0.4, 0.4, 0.1) with
probability 0.8, grayscale 0.2, Gaussian blur of sigma 0.1 to 2.0 with probability 0.5.
PL-DC adds three boxes that may be erased.

The papers pad a view that is smaller than the crop. Here it stays small: a batch is
padded by torchvision, below and to the right, and padding is no part of a view.

*Why the student's view must be hard.* If both saw the same view, the student would soon
copy the teacher and learn nothing more. The distortion removes color and fine texture,
on which a small network relies most, so that shape is left to agree on.

Every view has a seed of its own, so a run does not depend on how the images are spread
over workers and processes.

Chain: 4 of 24. Read next: `ssis/copy_paste.py`, what comes between the two views.
"""

from typing import NamedTuple

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
# PL-DC's three boxes (Unbiased Teacher's): probability, fraction of the image's area,
# aspect ratio. They are filled with noise.
ERASING = v2.Compose(
    [
        v2.RandomErasing(0.7, (0.05, 0.2), (0.3, 3.3), value="random"),
        v2.RandomErasing(0.5, (0.02, 0.2), (0.1, 6), value="random"),
        v2.RandomErasing(0.3, (0.02, 0.2), (0.05, 8), value="random"),
    ]
)
# Cityscapes in all three papers: the color distortion of SSD, each part with
# probability one half. (There brightness is shifted by up to 32 of 255, and contrast
# scales the pixels; here brightness is scaled by as much, and contrast about the mean.)
DISTORT = v2.Compose(
    [
        v2.RandomApply([v2.ColorJitter(brightness=(0.875, 1.125))]),
        v2.RandomApply([v2.ColorJitter(contrast=(0.5, 1.5))]),
        v2.RandomApply([v2.ColorJitter(saturation=(0.5, 1.5))]),
        v2.RandomApply([v2.ColorJitter(hue=0.1)]),
    ]
)


class ViewSize(NamedTuple):
    """What a weak view may look like.

    Attributes:
        short_min, short_max, long_max: pixels; the short side is drawn from the first
            to the second, unless the long side would pass the third.
        crop: height and width, pixels. With a crop the three do not count: the image is
            resized to `scale` times what fits into the crop, and cut. (0, 0): no crop.
        scale: the smallest and the largest scale before a crop.
        color: whether colors are distorted.
        flip: whether one view in two is mirrored, left to right.
    """

    short_min: int
    short_max: int
    long_max: int
    crop: tuple[int, int] = (0, 0)
    scale: tuple[float, float] = (1.0, 1.0)
    color: bool = False
    flip: bool = True


class Geometry(NamedTuple):
    """How a weak view was made from its original: what SAM's prompts need to know.

    Resized, then cropped, then mirrored. Padding is no part of it: a view ends where
    the image ends, and the model pads a batch of views below and to the right.

    Attributes:
        original: height and width of the original image.
        scaled: height and width of the whole image after resizing.
        offset: top and left of the crop, in pixels of the resized image.
        view: height and width of the view.
        flip: whether it is mirrored, left to right.
    """

    original: tuple[int, int]
    scaled: tuple[int, int]
    offset: tuple[int, int]
    view: tuple[int, int]
    flip: bool

    def to_original(self, points: Tensor) -> Tensor:
        """Points (.., 2) of the view, x and y, in the original frame.

        Continuous coordinates in both: the center of the first pixel is 0.5.
        """
        # Mirrored about the middle of the view: with continuous coordinates x becomes
        # width - x. With pixel numbers it would be width - 1 - x, the usual slip.
        x, y = points.unbind(dim=-1)
        x = self.view[1] - x if self.flip else x
        # Back into the resized image, then to the size of the original.
        top, left = self.offset
        scale_y, scale_x = (
            o / s for o, s in zip(self.original, self.scaled, strict=True)
        )
        return torch.stack([(x + left) * scale_x, (y + top) * scale_y], dim=-1)

    def from_original(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Locations of the original, as fractions of its sides, in pixels of the view.

        Args:
            rows, columns: (R,), (K,) fractions of height and width.

        Returns:
            y (R,) and x (K,); outside of the view they are below 0 or beyond its sides.
        """
        # Mirrored as a whole, the scaled image has on the left of the crop what was on
        # its right. Fractions are mirrored, not pixels: without a crop nothing is
        # rounded that was not.
        top, left = self.offset
        if self.flip:
            columns, left = 1 - columns, self.scaled[1] - left - self.view[1]
        return rows * self.scaled[0] - top, columns * self.scaled[1] - left

    def to_view(self, maps: Tensor) -> Tensor:
        """Maps (.., h, w) of the whole original, of the size `scaled`, in the view."""
        (top, left), (height, width) = self.offset, self.view
        maps = maps[..., top : top + height, left : left + width]
        return maps.flip(-1) if self.flip else maps


def weak_view(
    image: Tensor,
    target: dict | None,
    size: ViewSize,
    seed: int,
    original: tuple[int, int] | None = None,
):
    """Resize at random, crop where asked, and flip with probability one half.

    Args:
        image: (3, H, W) uint8, the whole original, perhaps `reduced`.
        target: `labels` (N,) and `masks` (N, H, W) uint8, or None.
        size: the limits of its sides, or its crop.
        seed: of this view.
        original: height and width of the original; None: those of `image`.

    Returns:
        image (3, h, w) float32 in [0, 1], the target with its masks in that frame, and
        its `Geometry`. Masks may have become empty: `targets.sanitize` comes next.
    """
    # One generator for each view, seeded by the stream: it does not matter which worker
    # makes the view, or what was made before it. With a crop not with the strong view's
    # seed: the scale and whether colors are jittered would be the same first draw.
    # (Without a crop the flip shares a draw with the strong view's grayscale: the 4 %
    # of views that are gray are all mirrored. To mend it would change all recorded
    # runs.)
    generator = torch.Generator().manual_seed(seed ^ 4 if size.crop[0] else seed)
    original = original or tuple(image.shape[-2:])
    geometry = draw_geometry(original, size, generator)
    # First the pixels, as uint8 (a quarter of the memory), then the masks.
    # A view with a crop may be ten times smaller, and would be full of false edges.
    image = resize_to(image, list(geometry.scaled), antialias=size.crop[0] > 0)
    if target is not None:
        target = dict(target, masks=view_masks(target["masks"], geometry))
    # From 0..255 to 0..1, which is what torchvision's models normalize.
    image = F.to_dtype(geometry.to_view(image), torch.float32, scale=True)
    # Cityscapes' distortion belongs to the view itself: the teacher sees it as well.
    # Not with the strong view's seed: both begin with the same kind of draw, and every
    # brightened view would have a strong jitter.
    if size.color:
        image = distorted(image, DISTORT, seed ^ 2)
    return image, target, geometry


def draw_geometry(
    original: tuple[int, int], size: ViewSize, generator: torch.Generator
) -> Geometry:
    """Size, crop and flip of a view.

    Args:
        original: height and width of the image.
        size: what is allowed.
        generator: of this view.
    """

    def draw(low: int, high: int) -> int:
        return torch.randint(low, high + 1, (), generator=generator).item()

    # Two rules for the size: that of the papers with crops, or torchvision's.
    height, width = original
    crop = size.crop if size.crop[0] else None
    if crop:
        # Large-scale jitter: s times the largest size that fits into the crop.
        low, high = size.scale
        s = low + (high - low) * torch.rand((), generator=generator).item()
        scale = s * min(crop[0] / height, crop[1] / width)
    else:
        scale = fitting(original, draw(size.short_min, size.short_max), size.long_max)
    scaled = sides(original, scale)
    # Mirrored last, but drawn before the crop: views without crops draw no more.
    flip = torch.rand((), generator=generator).item() < 0.5 and size.flip
    # What is smaller than the crop is not cut; what is larger is cut anywhere.
    view = [min(pair) for pair in zip(scaled, crop or scaled, strict=True)]
    offset = [draw(0, s - v) if s > v else 0 for s, v in zip(scaled, view, strict=True)]
    return Geometry(original, tuple(scaled), tuple(offset), tuple(view), flip)


def resize(image: Tensor, short: int, longest: int) -> Tensor:
    """Short side to `short`, unless the long side would pass `longest`.

    Without antialiasing, as torchvision's own Mask R-CNN resizes: its published weights
    were trained on such pixels. A strip is not made narrower than 16 pixels.
    """
    size = tuple(image.shape[-2:])
    scale = fitting(size, short, longest)
    return resize_to(reduced(image, longest), sides(size, scale))


def reduced(image: Tensor, longest: int) -> Tensor:
    """An image that is more than four times too large, at twice the size of its views.

    Bilinear resizing reads two pixels of each row and skips what lies between: the view
    of a photograph of 12 megapixels would be noise. Here every pixel counts.

    Args:
        image: (3, H, W).
        longest: limit of the long side of a view, pixels.
    """
    size = tuple(image.shape[-2:])
    scale = 2 * longest / max(size)
    return (
        resize_to(image, sides(size, scale), antialias=True) if scale < 0.5 else image
    )


def resize_to(image: Tensor, size: list[int], antialias: bool = False) -> Tensor:
    """The image in another size."""
    same = size == list(image.shape[-2:])
    return image if same else F.resize(image, size, antialias=antialias)


def fitting(size: tuple[int, int], short: int, longest: int) -> float:
    """The scale of both sides: whichever limit is reached first decides."""
    return min(short / min(size), longest / max(size))


def sides(size: tuple[int, int], scale: float) -> list[int]:
    """Height and width in whole pixels, at a scale."""
    return [max(16, round(side * scale)) for side in size]


def resize_masks(masks: Tensor, image: Tensor) -> Tensor:
    """Masks (N, H, W) to the size of a resized image.

    Nearest neighbor, so a mask stays 0 or 1; the exact one, since plain NEAREST rounds
    down and shifts the masks by half a pixel against the image.
    """
    return F.resize(masks, list(image.shape[-2:]), NEAREST_EXACT)


def view_masks(masks: Tensor, geometry: Geometry) -> Tensor:
    """Masks (N, H, W) of the original, or of it reduced, in a view: (N, h, w), on CPU.

    What `geometry.to_view` makes of the resized masks, but only the view's pixels are
    made: at four times the crop's size 50 masks of Cityscapes would take 420 MB.
    """
    # The row and the column of the original that each one of the scaled image shows.
    # Their numbers are resized as masks are, so both agree to the pixel.
    (height, width), scaled = masks.shape[-2:], geometry.scaled
    rows = torch.arange(height, dtype=torch.float32)[None, :, None]
    columns = torch.arange(width, dtype=torch.float32)[None, None]
    rows = F.resize(rows, [scaled[0], 1], NEAREST_EXACT).expand(1, *scaled)
    columns = F.resize(columns, [1, scaled[1]], NEAREST_EXACT).expand(1, *scaled)
    # Cut and mirrored like any map.
    rows = geometry.to_view(rows)[0, :, 0].long().numpy()
    columns = geometry.to_view(columns)[0, 0].long().numpy()
    # NumPy's `take` is twice as fast as PyTorch's indexing here, or more.
    return torch.from_numpy(masks.numpy()[:, rows].take(columns, axis=2))


def strong_view(image: Tensor, seed: int, erasing: bool = False) -> Tensor:
    """The photometric distortion of one image.

    Args:
        image: (3, H, W) float in [0, 1], a weak view, on any device.
        seed: of this view.
        erasing: whether boxes may be erased (PL-DC).

    Returns:
        (3, H, W) float in [0, 1]; no pixel has moved.
    """
    # On the image's device: the loader's workers make weak views, since the teacher
    # needs those; the distortion follows in the training process.
    strong = distorted(image, STRONG, seed)
    # Noise of a normal distribution: what is beyond black and white is cut off. The
    # boxes have a seed of their own, so that the colors are those of a view without
    # them.
    return distorted(strong, ERASING, seed ^ 1).clamp(0, 1) if erasing else strong


def distorted(image: Tensor, transform: v2.Transform, seed: int) -> Tensor:
    """An image after a random transform of torchvision, which follows the seed alone.

    torchvision draws from the global generator, whose state is saved and restored.
    """
    with torch.random.fork_rng(devices=[]):
        # The CPU's generator alone: `torch.manual_seed` would also reseed those of the
        # GPUs, which this context does not restore.
        torch.default_generator.manual_seed(seed)
        return transform(image)


def strong_views(
    images: list[Tensor], items: list[dict], erasing: bool = False
) -> list[Tensor]:
    """The strong view of each image, by the seed of its item."""
    pairs = zip(images, items, strict=True)
    return [strong_view(image, item["seed"], erasing) for image, item in pairs]
