r"""COCO, Cityscapes, PASCAL VOC and your own data, ready to train on; official splits.

    python -m ssis.prepare coco       --root COCO       --out data/coco
    python -m ssis.prepare cityscapes --root CITYSCAPES --out data/cityscapes
    python -m ssis.prepare voc        --root VOCdevkit  --out data/voc
    python -m ssis.prepare own --json J --root IMAGES   --out data/own [--val 20%]

`--root` is the folder as the dataset's site gives it. `--out` becomes what the presets
of the same name train on: `instances_train.json` and `instances_val.json` beside links
`train` and `val` to the images, which are not copied, and `splits/`, each file of which
`--labeled` takes: this project's own, for the papers' shares and three seeds, and those
that were published (`--lists`, see `ssis/published.py`).

* **COCO** is in this format already: it is linked, checked and counted.
* **Cityscapes** and **VOC 2012** are converted (`ssis/convert.py`); a command that was
  killed goes on where it was.
* **Your own**: one COCO JSON, as an annotation tool exports it, is checked and parted
  into training and validation images.

Read next: `ssis/split.py`, the labelled part.
"""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

from tqdm import tqdm

from ssis import UserError, coco_json, convert, distributed, published, split
from ssis.files import whole, write_text, writing

# Images of the training and validation parts, as the sites say.
OFFICIAL = {
    "coco": (118_287, 5_000),
    "cityscapes": (2_975, 500),
    "voc": (1_464, 1_449),
}
# The labelled shares that the papers report, in percent; VOC is in neither.
SHARES = {"coco": (1, 2, 5, 10), "cityscapes": (5, 10, 20, 30), "voc": (5, 10, 20, 30)}
SEEDS = (0, 1, 2)


def link(path: Path, target: Path) -> None:
    """Make `path` a link to `target`, in place of an older link."""
    if not target.exists():
        raise UserError(f"{target}: not found; is --root the folder that holds it?")
    if path.exists() and not path.is_symlink():
        raise UserError(f"{path}: is there and is no link; choose another --out")
    with writing(path, "--out"), whole_link(path) as temporary:
        temporary.symlink_to(target.resolve())


@contextlib.contextmanager
def whole_link(path: Path):
    """As `files.whole`, for a link, which has no content to be forced to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    yield temporary
    temporary.replace(path)


def check(dataset: str, out: Path, part: str) -> coco_json.Dataset:
    """Read a part as training will, look at every image, and print what there is."""
    found = coco_json.load_coco(
        str(out / f"instances_{part}.json"), str(out / part), None
    )
    for index in tqdm(range(len(found)), unit="image", desc=f"check {part}"):
        found.check_file(index)
    crowds = int(found.crowd.sum())
    official = OFFICIAL.get(dataset, 2 * [len(found)])[part == "val"]
    note = "" if len(found) == official else f" (the official part has {official})"
    print(
        f"{part}: {len(found)} images{note}, {len(found.labels) - crowds} instances of "
        f"{len(found.names)} classes, {crowds} crowds"
    )
    for line in found.warnings:
        print(f"warning: {line}", file=sys.stderr)
    return found


def write_splits(dataset: str, out: Path, train_set, lists: list[str]) -> None:
    """The project's own splits, and the published ones in `lists`."""
    folder, names = out / "splits", []

    def add(name: str, chosen: list[int], seed: int | None, source: str) -> None:
        names.append(name)
        with writing(folder / f"{name}.json", "--out"):
            folder.mkdir(exist_ok=True)
            with whole(folder / f"{name}.json") as temporary:
                split.write_split(train_set, chosen, temporary, seed, source)

    for seed in SEEDS:
        for share in SHARES[dataset]:
            # `--labeled 5% --seed 1` draws the same one.
            with contextlib.suppress(UserError):  # so few images that 1 % is none
                chosen, _ = split.draw_split(train_set, f"{share}%", seed)
                add(f"seed{seed}-{share}pct", chosen, seed, "")
    for path in lists:
        for name, chosen in published.read(path, train_set).items():
            add(name, chosen, None, Path(path).name)
    print(f"{len(names)} splits in {folder}/, for --labeled: {', '.join(names[:4])} …")


def part_own(source: str, folder: Path, out: Path, share: str) -> None:
    """Part one JSON into `instances_train.json` and `instances_val.json`.

    Args:
        source: the COCO JSON.
        folder: its images.
        out: folder to write.
        share: of the validation part, as for `--labeled`: 20% or 6.
    """
    dataset = coco_json.load_coco(source, str(folder))
    try:
        # A draw that covers the classes, so that each can be judged.
        chosen, warnings = split.draw_split(dataset, share, 0)
    except UserError as error:
        raise UserError(str(error).replace("--labeled", "--val")) from error
    for line in (*dataset.warnings, *warnings):
        print(f"warning: {line}".replace("learnt", "judged"), file=sys.stderr)
    if len(chosen) == len(dataset):
        raise UserError(f"--val {share}: leaves no image to train on")
    raw, val = coco_json.load_json(source, "COCO JSON"), set(chosen)
    for part in ("train", "val"):
        # The reader keeps the order of the JSON's images.
        images = [
            x for i, x in enumerate(raw["images"]) if (i in val) == (part == "val")
        ]
        ids = {coco_json.as_number(image["id"]) for image in images}
        rows = [
            a for a in raw["annotations"] if coco_json.as_number(a["image_id"]) in ids
        ]
        content = dict(raw, images=images, annotations=rows)
        with writing(out / f"instances_{part}.json", "--out"):
            out.mkdir(parents=True, exist_ok=True)
            write_text(out / f"instances_{part}.json", json.dumps(content))
        link(out / part, folder)


def run(argv: list[str] | None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ssis.prepare",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("dataset", choices=(*OFFICIAL, "own"))
    parser.add_argument("--root", type=Path, required=True, help="as its site gives it")
    parser.add_argument("--out", type=Path, help="default: data/<dataset>")
    parser.add_argument("--json", help="of own: its COCO JSON")
    parser.add_argument(
        "--val", default="20%", help="of own: share or number of images"
    )
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
    if (args.dataset == "own") != bool(args.json):
        raise UserError("--json J: goes with own, and own with it")
    if args.dataset == "own":
        part_own(args.json, args.root, out, args.val)
        for part in ("train", "val"):
            check(args.dataset, out, part)
        print(f"ready: train.py --preset custom --data {out} --labeled 100% ...")
        return
    parts = {}
    for part in ("train", "val"):
        if args.dataset == "coco":
            truth = args.root / "annotations" / f"instances_{part}2017.json"
            link(out / f"instances_{part}.json", truth)
            folder = args.root / f"{part}2017"
        else:
            folder = convert.convert_part(
                args.dataset, args.root, out, part, args.workers
            )
        link(out / part, folder)
        parts[part] = check(args.dataset, out, part)
    write_splits(args.dataset, out, parts["train"], args.lists)
    print(f"ready: train.py --preset {args.dataset} --data {out}")


def main(argv: list[str] | None = None) -> None:
    """`run`, with one line and status 2 for what the user did wrong."""
    try:
        run(argv)
    except UserError as error:
        distributed.give_up(error)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
