r"""Published splits: the lists of labeled images that papers were run with.

A result at "1 %" depends on which hundredth it was. Four forms are read, told apart by
their content; `python -m ssis prepare ... --lists FILE` makes files for `--labeled` of
them.

* **Unbiased Teacher's `COCO_supervision.txt`** (Liu et al., ICLR 2021), which PAIS,
  Polite Teacher and others share: JSON, percentage -> number of the fold -> list of
  *positions*. The file does not say among which images: they are the 117,266 training
  images that have an annotation other than a crowd, in the order of their ids
  (detectron2 leaves the others out, `FILTER_EMPTY_ANNOTATIONS`). Counted among all
  118,287 a position would be another image. (A later version of that repository's
  loader reads the numbers as image ids, which four of five are not; the file was drawn,
  and the paper run, with positions.)
* **Guided Distillation's `instances_train2017_<percentage>.json`**: the COCO JSON of
  the labeled images alone. The script that draws them has no seed, so the files, not
  the command, are the split.
* **Guided Distillation's `perc_<percentage>.txt`** for Cityscapes, which S4M and PL-DC
  use too: the file name of an image's annotations on each line, such as
  `bremen_000041_000019_gtFine_instanceIds.png`. Lists of image names, with or without
  folder and extension (VOC's `2007_000032`), are read by the same rule.
* A split of this project (`labeled.json`).

Read next: `ssis/datasets/split.py`, which reads the last of them.
"""

import json
import re
from pathlib import Path, PurePosixPath

from ssis import UserError
from ssis.datasets.dataset import Dataset


def read(path: str, dataset: Dataset) -> dict[str, list[int]]:
    """The splits in a published list.

    Args:
        path: the file.
        dataset: the training images from which it chooses.

    Returns:
        A name for each split, and the sorted indices of its labeled images.

    Raises:
        UserError: not such a list, or one of other images.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or "not text"
        raise UserError(f"--lists {path}: cannot be read ({said})") from error
    # "COCO_supervision.txt" -> COCO_supervision
    stem = re.sub(r"[^\w.-]", "_", Path(path).stem)
    try:
        content = json.loads(text)
    except ValueError:
        return {stem: named(text.split(), dataset, path)}
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        names = [str(image.get("file_name")) for image in content["images"]]
        return {stem: named(names, dataset, path)}
    if isinstance(content, dict) and isinstance(content.get("labeled"), list):
        content = content["labeled"]
    if isinstance(content, list) and all(isinstance(x, str) for x in content):
        return {stem: named(content, dataset, path)}
    if isinstance(content, dict) and content:
        return supervision(content, dataset, path, stem)
    raise UserError(
        f"--lists {path}: not a list of labeled images: neither names, one a line, "
        "nor a COCO JSON, nor percentage -> fold -> positions"
    )


def supervision(
    content: dict, dataset: Dataset, path: str, stem: str
) -> dict[str, list[int]]:
    """Unbiased Teacher's form: percentage -> fold -> positions."""
    ids = dataset.image_ids[: dataset.annotated]
    order = sorted(range(dataset.annotated), key=lambda index: ids[index])
    order = [index for index in order if dataset.present_labels(index)]
    splits = {}
    for percentage, folds in content.items():
        try:
            for fold, positions in folds.items():
                count = int(float(percentage) / 100 * len(order))
                if len(positions) != count or max(positions, default=0) >= len(order):
                    raise UserError(
                        f"--lists {path}: {percentage} % has {len(positions)} "
                        f"positions, of {len(order)} images with instances in "
                        f"{dataset.source} it would be {count}; is it the list of "
                        "another dataset?"
                    )
                # "1.0" -> 1; "0.5" stays.
                name = f"{stem}-{float(percentage):g}pct-fold{fold}"
                splits[name] = sorted(order[position] for position in positions)
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(
                f"--lists {path}: {percentage!r} is not a percentage with folds of "
                "positions"
            ) from error
    # A percentage of less than one image is no split.
    return {name: chosen for name, chosen in splits.items() if chosen}


def named(names: list[str], dataset: Dataset, path: str) -> list[int]:
    """Indices of images by the names in a list."""
    position = {key(dataset.files[i]): i for i in range(dataset.annotated)}
    if len(position) < dataset.annotated:
        raise UserError(
            f"{dataset.source}: has images of the same name in several folders; a list "
            "of names cannot tell them apart"
        )
    unknown = [name for name in names if key(name) not in position]
    if unknown or not names:
        what = f"{len(unknown)} names, the first {unknown[0]!r}," if unknown else "none"
        raise UserError(
            f"--lists {path}: {what} of {len(names)} that {dataset.source} does not "
            "list; is it the list of another dataset?"
        )
    return sorted({position[key(name)] for name in names})


def key(name: str) -> str:
    """What the names of an image and of its annotations have in common."""
    stem = PurePosixPath(str(name)).stem
    return re.sub(r"_(gtFine_instanceIds|leftImg8bit|gtFine_polygons)$", "", stem)
