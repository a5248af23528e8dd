r"""Any image file as an upright RGB tensor, or one line that says why not.

Real folders hold gray, palette, CMYK, 16-bit and EXIF-rotated images. torchvision's
models accept RGB floats only, and fail late and oddly on the rest: an image of one
channel is silently broadcast, one of uint8 is a TypeError.

Read next: `ssis/datasets/dataset.py`, which knows what is on the images.
"""

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ssis import UserError

IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp")
# EXIF orientations 5 to 8 swap width and height.
SWAPS_SIDES = (5, 6, 7, 8)


def read_image(path: str, expected: tuple[int, int] | None = None) -> Tensor:
    """Any image file as (3, H, W) uint8 RGB, upright.

    Args:
        path: the file: gray, palette, CMYK, with alpha, 16 bits, EXIF-rotated.
        expected: (height, width) that the annotations were made for, if known.

    Raises:
        UserError: not there, not an image, or of another size than expected.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            # Most tools annotate the image as viewers show it, some as it is stored;
            # the size in the JSON tells which.
            if (
                expected
                and upright.size[::-1] != expected
                and image.size[::-1] == expected
            ):
                upright = image
            if upright.mode.startswith(("I", "F")):
                # Pillow would clip 16-bit values at 255 and so turn them white. The
                # range is the smallest usual one that holds the image: [0, 1] floats,
                # 8, 12 or 16 bits.
                values = np.asarray(upright, dtype=np.float64)
                highest = values.max(initial=0)
                ranges = (1.0, 255.0, 4095.0, 65535.0)
                if upright.mode != "F":
                    ranges = ranges[1:]
                top = next((limit for limit in ranges if highest <= limit), highest)
                upright = Image.fromarray(
                    (values.clip(0, top) * (255 / top)).astype(np.uint8)
                )
            pixels = np.array(upright.convert("RGB"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: image not found; is the image folder the right one?"
        ) from error
    except MemoryError:
        raise
    # Every exception: a damaged file can make Pillow fail in any way.
    except Exception as error:
        # `expected` comes from a JSON, which then names the file.
        where = " or remove it from the JSON" if expected else ""
        raise UserError(
            f"{path}: cannot be read as an image ({error}); replace it{where}"
        ) from error
    check_size(path, pixels.shape[:2], expected)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def check_size(path: str, size: tuple, expected: tuple | None) -> None:
    """Raise UserError when an image is not of the size its annotations were made on."""
    if expected and tuple(size) != tuple(expected):
        raise UserError(
            f"{path}: is {size[1]} x {size[0]} pixels, the JSON says "
            f"{expected[1]} x {expected[0]}; correct width and height, or the file"
        )


def check_header(path: str, expected: tuple[int, int] | None) -> None:
    """Raise UserError when a file's header is not that of an image of this size.

    `expected` is (height, width), or None for any size. No pixel is decoded.
    """
    try:
        with Image.open(path) as image:
            size = image.size[::-1]
            turned = image.getexif().get(0x0112) in SWAPS_SIDES
    except MemoryError:
        raise
    # Every exception: a damaged file can make Pillow fail in any way.
    except Exception as error:
        raise UserError(
            f"{path}: cannot be read as an image ({error}); replace it or remove it "
            "from the JSON"
        ) from error
    if not (turned and size[::-1] == expected):
        check_size(path, size, expected)
