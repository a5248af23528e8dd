r"""The mask of one COCO annotation, in all the forms in which tools write it.

Polygons in several parts; one polygon without the list around it; two corners of a
rectangle; run lengths (RLE), compressed or as numbers. What is read in a way of its
own, or left out, is counted and told at the end (`NOTES`); what cannot be meant ends
with one line that names the annotation.

Read next: `ssis/datasets/dataset.py`, which keeps the bytes.
"""

from array import array
from collections import Counter

from pycocotools import mask as mask_utils

from ssis import UserError

# What is counted while masks are read, and told at the end.
NOTES = {
    "empty": "without a mask are left out",
    "boxes": "have a box but no mask and are left out, so that training takes their "
    "objects for background; draw masks, or let SAM (prepare own --masks-from-boxes)",
    "twice": "are duplicates (same image, class and mask) and are left out",
    "corners": "give only two opposite corners and are read as rectangles",
    "fractions": "lie between 0 and 1, as fractions of the image, and are left out; "
    "multiply x by its width and y by its height",
}


def read_mask(
    record: dict, size: list[int], path: str, told: Counter
) -> tuple[list[bytes], bool]:
    """The bytes of an annotation's polygons (float64), or of its compressed RLE.

    Args:
        record: the annotation.
        size: height and width of its image.
        path: the JSON, for messages.
        told: how often what `NOTES` tells was met; counted on here.

    Returns:
        The parts, none for an annotation that is left out; whether they are polygons.

    Raises:
        UserError: the mask cannot be meant.
    """
    segmentation = record.get("segmentation") or []
    if not segmentation and record.get("bbox"):
        told["boxes"] += 1
        return [], True
    try:
        if isinstance(segmentation, dict):
            parts = read_rle(segmentation, size)
            told["empty"] += not parts
            return parts, False
        if not isinstance(segmentation, list):
            raise ValueError("a segmentation that is neither polygons nor an RLE")
        if all(isinstance(value, (int, float)) for value in segmentation):
            # One polygon, without the list around it.
            segmentation = [segmentation]
        polygons = [read_polygon(part, size) for part in segmentation]
    except ValueError as error:
        raise UserError(f"{path}: annotation {record.get('id')} has {error}") from error
    if [len(numbers) for numbers in polygons] == [4]:
        polygons = [rectangle(polygons[0], record.get("bbox"))]
        told["corners"] += len(polygons[0]) == 8
    # A polygon needs three corners.
    polygons = [numbers for numbers in polygons if len(numbers) >= 6]
    # A little more and less than 0 and 1: rounding.
    if polygons and all(min(p) > -0.01 and max(p) < 1.01 for p in polygons):
        told["fractions"] += 1
        return [], True
    told["empty"] += not polygons
    return [numbers.tobytes() for numbers in polygons], True


def read_rle(segmentation: dict, size: list[int]) -> list[bytes]:
    """Compressed run lengths; none for a mask of nothing but background.

    Raises:
        ValueError: what is wrong, to be read after "has".
        KeyError, TypeError: it is no RLE at all.
    """
    if list(segmentation["size"]) != size:
        raise ValueError(f"an RLE of size {segmentation['size']}, its image is {size}")
    counts = segmentation["counts"]
    if isinstance(counts, list):
        # pycocotools would read beyond the end of runs that are too short.
        if min(counts, default=-1) < 0 or sum(counts) != size[0] * size[1]:
            raise ValueError("an RLE whose runs do not add up to its image")
        # COCO's crowds: run lengths as numbers. One form of RLE is enough.
        counts = mask_utils.frPyObjects(segmentation, *size)["counts"]
    if isinstance(counts, str):
        if not counts.isascii():
            raise ValueError("an RLE that is garbled")
        counts = counts.encode()
    elif not isinstance(counts, bytes):
        raise TypeError("RLE")
    return [counts] if mask_utils.area(dict(size=size, counts=counts)) else []


def read_polygon(part, size: list[int]) -> array:
    """The coordinates of a polygon, x and y in turn.

    Raises:
        ValueError: what is wrong, to be read after "has".
    """
    try:
        numbers = array("d", part)
    except TypeError as error:
        raise ValueError("a polygon that is not a list of numbers") from error
    if len(numbers) % 2:
        raise ValueError("a polygon with an odd number of coordinates")
    # pycocotools walks every pixel of an outline: one that leads to infinity, or over
    # NaN, for ever. (A comparison with NaN is false.)
    if not sum(map(abs, numbers)) <= 10 * len(numbers) * max(size):
        raise ValueError(
            "a polygon far outside of its image, or with a coordinate that is no number"
        )
    return numbers


def rectangle(numbers: array, box) -> array:
    """Two opposite corners as a polygon; as they are where they span no area.

    labelme's rectangle, as older converters write it. To pycocotools four numbers would
    be x, y, width and height, and so they are where they equal the annotation's box.
    """
    left, top, right, bottom = numbers
    if list(numbers) == box:
        right, bottom = left + right, top + bottom
    if left == right or top == bottom:
        return numbers
    return array("d", [left, top, right, top, right, bottom, left, bottom])
