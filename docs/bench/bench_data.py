r"""What data and evaluation cost, beside the plain way with torchvision and pycocotools.

    python docs/bench/bench_data.py pipeline [--json J --images D] [--size 800]
                        views per second / CocoDetection with transforms.v2
    python docs/bench/bench_data.py start
                        reading an annotation file of COCO's size: seconds, memory, and
                        the memory that each loader worker adds / pycocotools' own way
    python docs/bench/bench_data.py parts
                        boxes of masks and pasting, in photographs / torchvision's own
    python docs/bench/bench_data.py evaluate CHECKPOINT
                        evaluating a checkpoint / torchvision's forward pass and one RLE
                        at a time, as in torchvision's reference evaluator

    python docs/bench/bench_data.py ap [--json J --images D]
                        AP of 5,000 images by faster-coco-eval / by pycocotools

Both sides run in one call and their ratio is printed. Sides that differ in memory run in
processes of their own, since peak memory never falls.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection.mask_rcnn import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from ssis import augment, data, inference
from ssis.datasets import coco_json, parts, shapes
from ssis.engine import resume
from ssis.report import ap
from ssis.targets import boxes_of

# COCO's train2017: images, instances.
IMAGES, INSTANCES = 118_287, 860_001

# ---------------------------------------------------------------------------- pipeline


def pipeline(source: str, folder: str, size: int, items: int) -> None:
    """Weak and strong view of some images, with masks and boxes, in one process."""
    view_size = augment.ViewSize(size, size, 10 * size)
    dataset = coco_json.load_coco(source, folder)
    indices = [i for i in range(len(dataset)) if dataset.present_labels(i)]
    ours = data.Stream(dataset, indices, view_size, 0, with_target=True)
    with contextlib.redirect_stdout(io.StringIO()):
        plain = CocoDetection(folder, source)
    plain = wrap_dataset_for_transforms_v2(plain, target_keys=["masks", "boxes", "labels"])
    weak = v2.Compose(
        [
            v2.ToImage(),
            # Without antialiasing, as torchvision's Mask R-CNN resizes, and as we do.
            v2.Resize(size, max_size=10 * size, antialias=False),
            v2.RandomHorizontalFlip(),
            v2.SanitizeBoundingBoxes(),
            v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
        ]
    )
    strong = v2.Compose(
        [
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([v2.GaussianBlur(kernel_size=13, sigma=(0.1, 2.0))], p=0.5),
        ]
    )
    by_id = {k: place for place, k in enumerate(plain.ids)}

    def our_view(k: int) -> None:
        item = ours[k]
        augment.strong_view(item["image"], item["seed"])

    # The same images in the same order.
    order = [ours[k]["index"] for k in range(items)]

    def plain_view(k: int) -> None:
        index = order[k]
        image, target = plain[by_id[dataset.image_ids[index]]]
        image, target = weak(image, target)
        strong(image)

    sides = {"ssis": our_view, "torchvision": plain_view}
    times: dict[str, list] = {side: [] for side in sides}
    # Whole rounds in turn: a machine that slows down slows down both.
    for start in range(0, items, 16):
        turn = list(sides.items())
        for side, view in turn if start % 32 else turn[::-1]:
            began = time.perf_counter()
            for k in range(start, start + 16):
                view(k)
            times[side].append((time.perf_counter() - began) / 16)
    rates = {side: 1 / statistics.median(values) for side, values in times.items()}
    for side, rate in rates.items():
        print(f"{side:12} {rate:8.1f} images per second")
    print(f"ratio        {rates['ssis'] / rates['torchvision']:8.2f} (more is better)")


# ------------------------------------------------------------------------------- start


def write_large(path: Path) -> None:
    """A JSON of COCO's size: polygons of 8 to 40 corners; streamed, never all in memory."""
    rng = np.random.RandomState(0)
    with open(path, "w") as file:
        file.write('{"images": [')
        for k in range(IMAGES):
            record = dict(id=k, file_name=f"{k:012d}.jpg", height=480, width=640)
            file.write(("," if k else "") + json.dumps(record))
        file.write('], "annotations": [')
        for k in range(INSTANCES):
            corners = rng.randint(8, 41)
            angles = np.linspace(0, 2 * np.pi, corners, endpoint=False)
            x, y = rng.rand(2) * (500, 340) + 70
            radius = rng.uniform(20, 60, corners)
            points = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], 1)
            polygon = points.round(2).ravel().tolist()
            box = [round(x - 60, 2), round(y - 60, 2), 120, 120]
            record = dict(id=k + 1, image_id=int(rng.randint(IMAGES)), iscrowd=0, bbox=box,
                          category_id=int(rng.randint(1, 81)), area=5000.0,
                          segmentation=[polygon])  # fmt: skip
            file.write(("," if k else "") + json.dumps(record))
        classes = [dict(id=k, name=f"class {k}") for k in range(1, 81)]
        file.write(f'], "categories": {json.dumps(classes)}}}')


def private_memory() -> float:
    """MiB that this process shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


def status(key: str) -> float:
    """A size from /proc/self/status, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def worker(read, answer) -> None:
    """What a loader worker does to the annotations: read those of many random images."""
    before = private_memory()
    rng = np.random.RandomState(1)
    for index in rng.randint(0, IMAGES, 60_000):
        read(int(index))
    answer.put(private_memory() - before)


def start_side(side: str, path: str) -> None:
    """Read the file one way; print seconds, MiB at the end, MiB at the peak, MiB a worker."""
    empty, base = private_memory(), status("VmRSS")
    began = time.perf_counter()
    if side == "ssis":
        dataset = coco_json.load_coco(path, str(Path(path).parent))
        read = dataset.rles
    else:
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(path)

        def read(index: int) -> list:
            records = coco.loadAnns(coco.getAnnIds(imgIds=[index]))
            return [coco.annToRLE(record) for record in records]

    seconds = time.perf_counter() - began
    held = private_memory() - empty
    peak = status("VmHWM") - base
    # As the loader does on Linux: the worker is a copy of this process.
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    process = context.Process(target=worker, args=(read, answer))
    process.start()
    added = answer.get()
    process.join()
    print(json.dumps([seconds, held, peak, added]))


def start() -> None:
    """Both ways of reading, each in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.json"
        write_large(path)
        size = path.stat().st_size / 2**20
        print(f"{IMAGES} images, {INSTANCES} instances, {size:.0f} MiB of JSON")
        measured = {}
        for side in ("ssis", "pycocotools"):
            command = [sys.executable, __file__, "start-side", side, str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            measured[side] = json.loads(done.stdout)
            seconds, held, peak, added = measured[side]
            print(
                f"{side:12} {seconds:6.1f} s, holds {held:6.0f} MiB, peak {peak:6.0f} MiB, "
                f"each worker adds {added:6.0f} MiB"
            )
        ratios = [a / b for a, b in zip(measured["ssis"], measured["pycocotools"], strict=True)]
        print("ratio        {:6.2f}, {:.2f}, {:.2f}, {:.2f}".format(*ratios))


# ---------------------------------------------------------------------------- evaluate


def plain_evaluation(net, dataset) -> float:
    """Mask AP as torchvision's references compute it: batches, one mask at a time."""
    ground_truth = dataset.coco(range(len(dataset)))
    detections = {"segm": [], "bbox": []}
    with torch.no_grad():
        for start in range(0, len(dataset), 8):
            indices = range(start, min(start + 8, len(dataset)))
            views = [dataset.image(i).float() / 255 for i in indices]
            outputs = TorchvisionMaskRCNN.forward(net, views)
            for index, output in zip(indices, outputs, strict=True):
                boxes = output["boxes"].clone()
                boxes[:, 2:] -= boxes[:, :2]
                rows = zip(output["masks"], boxes, output["labels"], output["scores"], strict=True)
                for mask, box, label, score in rows:
                    pixels = np.asfortranarray((mask[0] > 0.5).numpy().astype(np.uint8))
                    rle = mask_utils.encode(pixels)
                    rle["counts"] = rle["counts"].decode()
                    shared = dict(image_id=index, category_id=label.item(), score=score.item())
                    detections["segm"].append(dict(shared, segmentation=rle))
                    detections["bbox"].append(dict(shared, bbox=box.tolist()))
    with contextlib.redirect_stdout(io.StringIO()):
        for kind in ("bbox", "segm"):
            results = ground_truth.loadRes(detections[kind])
            evaluator = COCOeval(ground_truth, results, kind)
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()
    return 100 * evaluator.stats[0]


def evaluation(checkpoint: str, rounds: int) -> None:
    """Both evaluations of one checkpoint, in turn."""
    net, settings, names, _ = resume.load_model(Path(checkpoint), "")
    dataset = coco_json.load_coco(*parts.part_paths(settings, "test"), names)
    times: dict[str, list] = {"ssis": [], "torchvision": []}
    for _ in range(rounds):
        began = time.perf_counter()
        report, _ = ap.evaluate(net, dataset, torch.device("cpu"))
        times["ssis"].append(time.perf_counter() - began)
        began = time.perf_counter()
        plain = plain_evaluation(net, dataset)
        times["torchvision"].append(time.perf_counter() - began)
    medians = {side: statistics.median(values) for side, values in times.items()}
    for side, mask_ap in (("ssis", report["mask"]["AP"]), ("torchvision", plain)):
        print(f"{side:12} {medians[side]:6.2f} s for {len(dataset)} images, mask AP {mask_ap:.2f}")
    print(f"ratio        {medians['ssis'] / medians['torchvision']:6.3f}")


def ap_alone(source: str, folder: str) -> None:
    """COCO's numbers for three detections an instance; the images repeated up to 5,000."""
    dataset = coco_json.load_coco(source, folder)
    once, rng = dataset.coco(range(len(dataset))).dataset, np.random.RandomState(0)
    images, annotations, results = [], [], []
    for copy in range(5000 // len(dataset)):
        shift = copy * len(dataset)
        images += [dict(image, id=image["id"] + shift) for image in once["images"]]
        for a in once["annotations"]:
            a = dict(a, id=len(annotations) + 1, image_id=a["image_id"] + shift)
            annotations.append(a)
            for _ in range(0 if a["iscrowd"] else 3):
                box = [float(x) for x in np.add(a["bbox"], rng.uniform(0, 9, 4))]
                result = dict(a, bbox=box, score=rng.random_sample())
                results.append(result)
    truth = COCO()
    truth.dataset = dict(once, images=images, annotations=annotations)
    both, seconds = ap.evaluator(), []
    for classes in (both, (COCO, COCOeval)):
        ap.evaluator = lambda classes=classes: classes
        began = time.perf_counter()
        found = [ap.average_precision(truth, results, kind)[0]["AP"] for kind in ("segm", "bbox")]
        seconds.append(time.perf_counter() - began)
        name = classes[1].__name__
        print(f"{name:16} {seconds[-1]:6.1f} s for {len(images)} images, {len(results)} "
              f"detections, mask and box AP {found[0]:.2f}, {found[1]:.2f}")  # fmt: skip
    print(f"ratio            {seconds[0] / seconds[1]:6.3f}")


def medians(sides: dict, rounds: int) -> None:
    """Time some functions in turns, and print their medians and the ratio of the two."""
    times = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            # The first round warms up.
            times[name] += [time.perf_counter() - start] * (round_ > 0)
    (ours, a), (plain, b) = ((name, statistics.median(t)) for name, t in times.items())
    print(f"{ours:<28} {1e3 * a:8.1f} ms   {plain:<28} {1e3 * b:8.1f} ms   ratio {a / b:.3f}")


@torch.no_grad()
def measure_parts(rounds: int) -> None:
    """Boxes of masks and pasting, at the sizes of photographs."""
    generator = torch.Generator().manual_seed(0)

    def boxes(count: int, height: int, width: int) -> torch.Tensor:
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 2 / 3
        span = (torch.rand(count, 2, generator=generator) + 0.1) * torch.tensor([width, height]) / 4
        return torch.cat([corner, corner + span], dim=1)

    masks = torch.zeros(12, 640, 960, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes(12, 640, 960).int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    assert torch.equal(boxes_of(masks)[:, :2], masks_to_boxes(masks)[:, :2])
    medians(
        {
            "boxes_of, 12 masks": lambda: boxes_of(masks),
            "ops.masks_to_boxes": lambda: masks_to_boxes(masks),
        },
        rounds,
    )

    for count, height, width in ((100, 480, 640), (20, 3000, 4000)):
        small, places = (
            torch.rand(count, 1, 28, 28, generator=generator),
            boxes(count, height, width),
        )
        given = (small, places, (height, width))
        medians(
            {
                f"paste_parts, {count} masks": lambda given=given: list(
                    inference.paste_parts(*given)
                ),
                f"torchvision, {height} x {width}": lambda given=given: paste_masks_in_image(
                    *given
                ),
            },
            min(rounds, 5),
        )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_subparsers(dest="what", required=True)
    part = what.add_parser("pipeline")
    part.add_argument("--json", default="data/shapes/instances_train.json")
    part.add_argument("--images", default="data/shapes/train")
    part.add_argument("--size", type=int, default=96, help="short side, pixels")
    part.add_argument("--items", type=int, default=640)
    what.add_parser("start")
    what.add_parser("parts")
    part = what.add_parser("start-side")
    part.add_argument("side")
    part.add_argument("path")
    part = what.add_parser("evaluate")
    part.add_argument("checkpoint")
    part.add_argument("--rounds", type=int, default=3)
    part = what.add_parser("ap")
    part.add_argument("--json", default="data/shapes/instances_val.json")
    part.add_argument("--images", default="data/shapes/val")
    args = parser.parse_args()
    if args.what == "pipeline":
        if args.json.startswith("data/shapes/"):
            shapes.make(Path("data/shapes"))
        pipeline(args.json, args.images, args.size, args.items)
    elif args.what == "parts":
        measure_parts(20)
    elif args.what == "start":
        start()
    elif args.what == "ap":
        ap_alone(args.json, args.images)
    elif args.what == "start-side":
        start_side(args.side, args.path)
    else:
        evaluation(args.checkpoint, args.rounds)


if __name__ == "__main__":
    main()
