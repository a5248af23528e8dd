r"""COCO mask and box AP of a checkpoint, per class.

    python evaluate.py runs/<name>/checkpoint.pt
    python evaluate.py CHECKPOINT --json J --images D [--who student] [--save-predictions F]

With `torchrun` several processes share the images. The numbers are pycocotools' own, all twelve,
for masks and for boxes; faster-coco-eval computes them sooner, where it is installed.

Read next: `ssis/report/ap.py`, which computes them.
"""

import argparse
import importlib.util
from pathlib import Path

from ssis import UserError, distributed, networks
from ssis.datasets import coco_json, parts
from ssis.engine.resume import add_model_flags, load_model
from ssis.io import program
from ssis.report import ap


def run(argv: list[str] | None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="COCO mask and box AP of a checkpoint.")
    add_model_flags(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", default="", help="COCO JSON; default: the run's test part")
    parser.add_argument("--images", default="", help="its image folder")
    parser.add_argument("--max-detections", type=int, metavar="N", help="in an image, as the run")
    parser.add_argument("--boundary", action="store_true", help="boundary AP too")
    parser.add_argument("--save-predictions", type=Path, metavar="F", help="COCO results JSON")
    args = parser.parse_args(argv)
    if bool(args.json) != bool(args.images):
        raise UserError("--json and --images go together: give both, or neither")
    if args.boundary and not importlib.util.find_spec("faster_coco_eval"):
        raise UserError("--boundary: needs a further package; pip install faster-coco-eval")
    if args.max_detections is not None and args.max_detections < 100:
        raise UserError(f"--max-detections {args.max_detections}: COCO's AP needs at least 100")
    net, config, names, who = load_model(args.checkpoint, args.who)
    source, folder = (args.json, args.images) if args.json else parts.part_paths(config, "test")
    dataset = coco_json.load_coco(source, folder, names)
    dataset.check_files()
    rank, world_size, device = distributed.start(args.device)
    if args.max_detections:
        networks.set_detections(net, args.max_detections)
    report, results = ap.evaluate(net.to(device), dataset, device, rank, world_size, progress=True)
    if rank == 0:
        print(f"{who} of {args.checkpoint} on {source}, {len(dataset)} images")
        columns = list(report["mask"])
        print(f"{'':8}" + "".join(f"{name:>7}" for name in columns))
        if args.boundary:
            truth, limit = dataset.coco(range(len(dataset))), net.roi_heads.detections_per_img
            report["boundary"], _ = ap.average_precision(truth, results, "boundary", limit)
        for kind in ("mask", "box", *(["boundary"] if args.boundary else [])):
            print(f"{kind:8}" + "".join(f"{text(report[kind][n]):>7}" for n in columns))
        print(f"{'AP per class':<22} {'mask':>6} {'box':>6}")
        for name, value in report["mask_per_class"].items():
            print(f"  {name:<20} {text(value):>6} {text(report['box_per_class'][name]):>6}")
        if args.save_predictions:
            boxes = ap.save_predictions(args.save_predictions, dataset, results)
            print(f"masks in {args.save_predictions}, boxes in {boxes}")
    distributed.stop()


def text(value: float | None) -> str:
    """A number for a table."""
    return "-" if value is None else f"{value:.1f}"


def main(argv: list[str] | None = None) -> None:
    """`run`, with one line and status 2 for what the user did wrong."""
    program.run(run, argv)


if __name__ == "__main__":
    main()
