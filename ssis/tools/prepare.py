r"""COCO, Cityscapes, PASCAL VOC and your own data, ready to train on; official splits.

    python -m ssis prepare coco       --root COCO       --out data/coco
    python -m ssis prepare cityscapes --root CITYSCAPES --out data/cityscapes
    python -m ssis prepare voc        --root VOCdevkit  --out data/voc
    python -m ssis prepare own --json J --root IMAGES   --out data/own [--val 20%]

`--root` is the folder as the dataset's site gives it. `--out` becomes what the preset
of the same name trains on: `instances_train.json` and `instances_val.json`, beside them
links `train` and `val` to the images, which are not copied, and (but for `own`)
`splits/`. Each file of `splits/` can be given to `--labeled`: this project's own
splits, for the papers' percentages and three seeds, and published ones (`--lists`, see
`ssis/datasets/published.py`).

* **COCO** is already in this format: it is linked, checked and counted.
* **Cityscapes** and **VOC 2012** are converted (`ssis/datasets/convert.py`); a command
  that was killed goes on where it was.
* **Your own**: one COCO JSON, as an annotation tool exports it, is checked and divided
  into training and validation images (`ssis/tools/prepare_own.py`).

Read next: `ssis/datasets/split.py`, the labeled part.
"""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

from tqdm import tqdm

from ssis import UserError
from ssis.datasets import coco_json, convert, published, split
from ssis.datasets.dataset import Dataset
from ssis.io import program
from ssis.io.files import whole, write_text, writing
from ssis.tools import prepare_own

# Images of the training and the validation part, as the datasets' sites state them.
OFFICIAL = {
    "coco": (118_287, 5_000),
    "cityscapes": (2_975, 500),
    "voc": (1_464, 1_449),
}
# Percentages of labeled images that the papers report; VOC is in neither.
PERCENT = {"coco": (1, 2, 5, 10), "cityscapes": (5, 10, 20, 30), "voc": (5, 10, 20, 30)}
SEEDS = (0, 1, 2)


def link(path: Path, target: Path) -> None:
    """Make `path` a link to `target`, in place of an older link."""
    if not target.exists():
        raise UserError(f"{target}: not found; is --root the folder that holds it?")
    if path.exists() and not path.is_symlink():
        raise UserError(f"{path}: is there and is no link; choose another --out")
    with writing(path, "--out"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as temporary:
            temporary.symlink_to(target.resolve())


def check(dataset: str, out: Path, part: str, names=None) -> Dataset:
    """Read a part as training will, look at every image, and print what there is.

    Args:
        dataset: its name.
        out: the folder.
        part: "train" or "val".
        names: the classes of the training part, when the validation part is checked.
    """
    source, folder = str(out / f"instances_{part}.json"), str(out / part)
    images = coco_json.load_coco(source, folder, names)
    # Those of an export of one's own were told when it was read.
    told = len(images.warnings) if dataset == "own" else 0
    for index in tqdm(range(len(images)), unit="image", desc=f"check {part}"):
        images.check_file(index)
    crowds = int(images.crowd.sum())
    official = OFFICIAL.get(dataset, 2 * [len(images)])[part == "val"]
    note = "" if len(images) == official else f" (the official part has {official})"
    present = set().union(*map(images.present_labels, range(len(images))))
    classes = len(images.names)
    of = f"{len(present)} of {classes}" if len(present) < classes else classes
    print(
        f"{part}: {len(images)} images{note}, {len(images.labels) - crowds} instances "
        f"of {of} classes, {crowds} crowds"
    )
    missing = [name for k, name in enumerate(images.names, 1) if k not in present]
    if part == "val" and missing:
        shown = ", ".join(missing[:8]) + (" …" if len(missing) > 8 else "")
        images.warnings.append(
            f"{images.source}: no image to judge {shown} by; give more to --val, or "
            "annotate more"
            if dataset == "own"
            else f"{images.source}: has no {shown}"
        )
    for line in images.warnings[told:]:
        print(f"warning: {line}", file=sys.stderr)
    return images


def write_splits(dataset: str, out: Path, train_set, lists: list[str]) -> None:
    """The project's own splits, and the published ones in `lists`."""
    folder, names = out / "splits", []

    def add(name: str, chosen: list[int], seed: int | None, source: str) -> None:
        # Lists in different folders may have the same name.
        unique, number = name, 2
        while unique in names:
            unique, number = f"{name}-{number}", number + 1
        names.append(unique)
        path = folder / f"{unique}.json"
        with writing(path, "--out"):
            folder.mkdir(exist_ok=True)
            split.write_split(train_set, chosen, path, seed, source)

    for seed in SEEDS:
        for percent in PERCENT[dataset]:
            # `--labeled 5% --seed 1` draws the same one.
            with contextlib.suppress(UserError):  # so few images that 1 % is none
                chosen, _ = split.draw_split(train_set, f"{percent}%", seed)
                add(f"seed{seed}-{percent}pct", chosen, seed, "")
    for path in lists:
        for name, chosen in published.read(path, train_set).items():
            add(name, chosen, None, Path(path).name)
    if names:
        shown = ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
        print(f"{len(names)} splits in {folder}/, for --labeled: {shown}")


def claim(dataset: str, out: Path, sources: list[str]) -> None:
    """Refuse a folder with files that are not this command's own, before writing any.

    Args:
        dataset: what is to be put there.
        out: the folder.
        sources: the JSONs of `own`, which must not be overwritten.

    Raises:
        UserError: the folder has an image folder or a JSON that this command, for this
            dataset, did not make.
    """
    for part in ("train", "val"):
        folder, target = out / part, out / f"instances_{part}.json"
        if folder.exists() and not folder.is_symlink():
            raise UserError(f"{folder}: is there and is no link; choose another --out")
        if not target.exists() or target.is_symlink():
            continue
        words = convert.description(target)
        if words[:2] != ["ssis.prepare", dataset] or any(
            Path(source).exists() and target.samefile(source) for source in sources
        ):
            raise UserError(
                f"{target}: is there and was not made by prepare {dataset}; choose "
                "another --out"
            )


def run(argv: list[str] | None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ssis prepare",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("dataset", choices=(*OFFICIAL, "own"))
    parser.add_argument("--root", type=Path, required=True, help="as its site gives it")
    parser.add_argument("--out", type=Path, help="default: data/<dataset>")
    prepare_own.add_flags(parser)
    parser.add_argument(
        "--lists", nargs="+", default=[], metavar="FILE", help="published splits"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args(argv)
    out = args.out or Path("data") / args.dataset
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be at least 1")
    if not args.root.is_dir():
        raise UserError(f"--root {args.root}: folder not found")
    given = [flag for flag in prepare_own.FLAGS if getattr(args, flag)]
    if (args.dataset == "own") != bool(args.json) or (given and not args.json):
        raise UserError(
            "own needs --json; --json, --match-names, --group-by and "
            "--masks-from-boxes are of own alone"
        )
    if args.lists and args.dataset == "own":
        raise UserError("--lists: published splits are of published datasets, not own")
    for path in args.lists:
        if not Path(path).is_file():
            raise UserError(f"--lists {path}: no such file")
    claim(args.dataset, out, args.json)
    if args.dataset == "own":
        for part, content in prepare_own.divide(args, out).items():
            with writing(out / f"instances_{part}.json", "--out"):
                out.mkdir(parents=True, exist_ok=True)
                write_text(out / f"instances_{part}.json", json.dumps(content))
            link(out / part, args.root)
        train_set = check(args.dataset, out, "train")
        check(args.dataset, out, "val", train_set.names)
        print(
            f"ready: python train.py --preset photos --data {out} ... (photographs), "
            f"or --preset custom --data {out} --labeled 100% ... (cells and the like)"
        )
        return
    train_set = None
    for part in ("train", "val"):
        if args.dataset == "coco":
            source = args.root / "annotations" / f"instances_{part}2017.json"
            link(out / f"instances_{part}.json", source)
            folder = args.root / f"{part}2017"
        else:
            folder = convert.convert_part(
                args.dataset, args.root, out, part, args.workers
            )
        link(out / part, folder)
        names = train_set.names if train_set else None
        images = check(args.dataset, out, part, names)
        train_set = train_set or images
    write_splits(args.dataset, out, train_set, args.lists)
    print(f"ready: train.py --preset {args.dataset} --data {out}")


def main(argv: list[str] | None = None) -> None:
    """`run`, with one line for what the user did wrong, and for Ctrl-C."""
    program.run(run, argv)
