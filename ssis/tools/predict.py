r"""What a trained model finds in images: pictures, COCO results, masks.

    python -m ssis predict runs/<name>/checkpoint.pt photo.jpg folder/ --out results

Reads JPEG, PNG, TIFF, WebP and BMP files (the first page of several; gray, with alpha,
16 bits, EXIF-rotated), one after the other, so that one image is in memory. A file that
cannot be read is named and skipped. Written into `--out`:

    overlays/<name>.png   the image with its instances, their classes and scores (no
                          words in a crowd); 256 to 2,048 pixels on the long side
    results.json          COCO results: image_id, category_id, bbox, segmentation, score
    coco.json             the same as a COCO dataset with images and classes: this
                          project can train on it, and tools that read masks as RLE
                          can load it
    masks/<name>/*.png    with --masks: each instance, 0 and 255, in the image's frame

Masks and boxes are in the frame of the original, upright. The last line that is printed
names up to ten images, those with the lowest mean score of what was found.

Read next: `evaluate.py`, which compares such results with the ground truth.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as mask_utils
from tqdm import tqdm

from ssis import UserError, distributed, networks
from ssis.datasets import rle
from ssis.engine import resume
from ssis.io import program
from ssis.io.files import writing
from ssis.io.images import IMAGE_TYPES, read_image
from ssis.report import ap, pictures

# Long side of an overlay, pixels: about that of a screen.
LARGEST = 2048
# Images that are named as those to correct first.
NAMED = 10


def find_images(given: list[str], out: Path) -> dict[str, Path]:
    """The images that the arguments name.

    Args:
        given: files, and folders, of which all images are taken, with sub-folders.
        out: folder of the output, which is no input.

    Returns:
        Name relative to its folder -> file; no file and no name twice.

    Raises:
        UserError: an argument does not exist, or there is no image.
    """
    images: dict[str, Path] = {}
    seen, taken = set(), set()
    # Of an earlier call; the images may lie in the same folder.
    own = {(out / name).resolve() for name in ("overlays", "masks")}
    for argument in map(Path, given):
        if argument.is_dir():
            files = sorted(
                path
                for path in argument.rglob("*")
                if path.suffix.lower() in IMAGE_TYPES and path.is_file()
            )
            named = [(path.relative_to(argument), path) for path in files]
        elif argument.exists():
            named = [(Path(argument.name), argument)]
        else:
            raise UserError(f"{argument}: no such file or folder")
        for name, path in named:
            real = path.resolve()
            if real in seen or own & set(real.parents):
                continue
            seen.add(real)
            # Two folders may have photos of one name; on some disks A and a are one.
            unique, number = name, 2
            while unique.as_posix().casefold() in taken:
                unique = name.with_stem(f"{name.stem}-{number}")
                number += 1
            taken.add(unique.as_posix().casefold())
            images[unique.as_posix()] = path
    if not images:
        types = ", ".join(IMAGE_TYPES)
        raise UserError(f"{', '.join(given)}: no image in it ({types})")
    return images


def save_masks(folder: Path, detections: list[dict], names: list[str]) -> None:
    """One PNG for each instance, best first: `000_star_0.98.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        # Of an earlier call, perhaps with another --score.
        old.unlink()
    for k, instance in enumerate(detections):
        mask = mask_utils.decode(instance["segmentation"]) * np.uint8(255)
        # A class may be called anything; a file may not.
        name = names[instance["category_id"] - 1]
        safe = "".join(c if c.isalnum() or c in "-_ " else "_" for c in name)[:60]
        Image.fromarray(mask).save(
            folder / f"{k:03d}_{safe}_{instance['score']:.2f}.png"
        )


def predict(net, names: list[str], files: dict[str, Path], out: Path, args) -> tuple:
    """Predict, draw and write, image by image.

    Args:
        net: a `model.MaskRCNN` in evaluation mode.
        names: class names.
        files: of `find_images`.
        out: folder to write.
        args: `score`, `masks`.

    Returns:
        The number of images that were read, the names of the least sure ones, and in
        how many images as many instances were found as are looked for.
    """
    device = next(net.parameters()).device
    records, results, full = [], [], 0
    try:
        with tqdm(files.items(), unit="image", disable=not sys.stderr.isatty()) as bar:
            for name, path in bar:
                try:
                    image = read_image(str(path))
                    (detections,) = ap.detect_instances(
                        net, [image], device, args.score
                    )
                except (UserError, MemoryError, RuntimeError) as error:
                    why = error
                    if not isinstance(error, UserError):
                        # A CPU's allocator raises a plain RuntimeError.
                        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
                        if not known and "can't allocate memory" not in str(error):
                            raise
                        why = f"{path}: too large for the memory"
                    bar.write(f"skipped: {why}", file=sys.stderr)
                    continue
                full += len(detections) == net.roi_heads.detections_per_img
                number = len(records) + 1
                height, width = image.shape[-2:]
                records.append(
                    dict(id=number, file_name=name, height=height, width=width)
                )
                results += [
                    dict(image_id=number, **instance) for instance in detections
                ]
                # The suffix stays: photo.jpg and photo.png are two images.
                target = out / "overlays" / f"{name}.png"
                with writing(target, "--out"):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    side = max(256, min(LARGEST, max(image.shape[-2:])))
                    pictures.detections(image, detections, names, side).save(target)
                    if args.masks:
                        save_masks(out / "masks" / name, detections, names)
    finally:
        # Also after Ctrl-C: the images so far are not lost.
        save(out, names, records, results)
    return len(records), least_sure(records, results), full


def least_sure(records: list[dict], results: list[dict]) -> list[str]:
    """The names of the images whose instances have the lowest mean score, lowest first.

    An image in which nothing was found is none of them: it may be empty.
    """
    scores: dict[int, list[float]] = {}
    for result in results:
        scores.setdefault(result["image_id"], []).append(result["score"])
    order = sorted(scores, key=lambda number: mean(scores[number]))
    # Images are numbered from 1.
    return [records[number - 1]["file_name"] for number in order[:NAMED]]


def save(out: Path, names: list[str], records: list[dict], results: list[dict]) -> None:
    """Write `results.json` and `coco.json`."""
    annotations = []
    for result in results:
        mask, label = result["segmentation"], result["category_id"]
        # A detection without a pixel is a legal result, but no annotation.
        if mask_utils.area(mask):
            more = dict(id=len(annotations) + 1, image_id=result["image_id"])
            more["score"] = result["score"]
            annotations.append(rle.annotation(mask, label, **more))
    categories = [dict(id=k, name=name) for k, name in enumerate(names, 1)]
    dataset = dict(
        info={}, images=records, annotations=annotations, categories=categories
    )
    for name, content in (("results.json", results), ("coco.json", dataset)):
        with writing(out / name, "--out"):
            out.mkdir(parents=True, exist_ok=True)
            (out / name).write_text(json.dumps(content))


def run(argv: list[str] | None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ssis predict",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    resume.add_model_flags(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("images", nargs="+", help="image files and folders")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--score", type=float, default=0.5, help="lowest class score")
    parser.add_argument(
        "--max-detections",
        type=int,
        metavar="N",
        help="in an image; default: the run's",
    )
    parser.add_argument("--masks", action="store_true", help="a PNG for each instance")
    args = parser.parse_args(argv)
    if not 0 <= args.score <= 1:
        raise UserError(f"--score {args.score}: must be from 0 to 1")
    if args.max_detections is not None and args.max_detections < 1:
        raise UserError(f"--max-detections {args.max_detections}: must be at least 1")
    files = find_images(args.images, args.out)
    # Up to 179 megapixels Pillow only warns; what is larger it refuses.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    net, _, names, who = resume.load_model(args.checkpoint, args.who)
    if args.max_detections:
        networks.set_detections(net, args.max_detections)
    _, _, device = distributed.start(args.device)
    count, unsure, full = predict(net.to(device), names, files, args.out, args)
    if not count:
        raise UserError("none of the images could be read")
    print(f"{who} of {args.checkpoint}: {count} of {len(files)} images, in {args.out}/")
    if full:
        limit = net.roi_heads.detections_per_img
        print(f"{full} with {limit} instances, the most looked for: --max-detections N")
    if len(unsure) > 1:
        print(f"least sure, so worth correcting first: {', '.join(unsure)}")


def main(argv: list[str] | None = None) -> None:
    """`run`, with one line and status 2 for what the user did wrong."""
    program.run(run, argv)
