r"""Which number says that something is there? The measurement behind ssis Eq. (found).

    python docs/bench/found.py runs/<name>/pretrained.pt [--images 300]

On unlabeled images whose ground truth is known, the first teacher's predictions are sorted

* by the class quality c, each class for itself, as torchvision does;
* by c, with one candidate for each object, whatever its class;
* by the foreground quality o, with one candidate for each object (`filters.objects`).

Printed, for as many of the best predictions as are a given fraction of the true instances: the
fraction that lies on an instance (box IoU >= 0.5), and the fraction that also has its class, from
the teacher and from `imagenet.ClassMeans`.

Then the AP of the first teacher on the validation images, as it is and with its detections named
by the class means: what a student could learn from them at best, and what could be had without
any semi-supervised training, for the price of a second network.
"""

import argparse

import torch
from category_classifiers import first_teacher
from torch.nn import functional as F
from torchvision.ops import nms

from ssis import correction, data, filters, imagenet, teacher
from ssis.datasets import parts
from ssis.report import ap
from ssis.targets import match

FRACTIONS = (0.15, 0.25, 0.4, 0.6, 0.8)


@torch.no_grad()
def renamed(encoder, val_set, results: list[dict]) -> list[dict]:
    """Detections of one candidate for each object, as every class, times its probability."""
    new = []
    for index in range(len(val_set)):
        own = [r for r in results if r["image_id"] == index]
        if not own:
            continue
        boxes = torch.tensor([r["bbox"] for r in own])
        boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
        best = nms(boxes, torch.tensor([r["score"] for r in own]), filters.NMS_IOU)
        vectors = encoder.embed(val_set.image(index) / 255, boxes[best])
        opinion = (vectors @ F.normalize(encoder.sums, dim=1).T / imagenet.TEMPERATURE).softmax(1)
        for row, k in zip(opinion.tolist(), best.tolist(), strict=True):
            for label, p in enumerate(row, start=1):
                new.append(dict(own[k], category_id=label, score=own[k]["score"] * p))
    return new


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--images", type=int, default=300)
    args = parser.parse_args()
    net, dataset, settings, labeled, rest, encoder, _ = first_teacher(args.checkpoint)
    view = settings.view_size
    correction.fill(encoder, net, data.Stream(dataset, labeled, view, 0, True), 0, 1)
    stream, instances = data.Stream(dataset, rest, view, 1, True), 0
    rows = {"c, each class for itself": [], "c": [], "o": []}
    for k in range(args.images):
        image, target = stream[k]["image"], stream[k]["target"]
        instances += len(target["labels"])
        predicted = teacher.predict(net, [image], 0.1)[0]
        of_class = nms(predicted.boxes, predicted.class_quality, filters.NMS_IOU)
        ways = (predicted, predicted[of_class], filters.objects(predicted))
        for name, one in zip(rows, ways, strict=True):
            quality = filters.foreground(one) if name == "o" else one.class_quality
            order = quality.argsort(descending=True)
            one, quality = one[order], quality[order]
            partner = match(one.boxes, target["boxes"])
            found = partner >= 0
            true = torch.zeros(len(one), dtype=torch.int64)
            true[found] = target["labels"][partner[found]]
            named = encoder(image, one).argmax(dim=1) + 1
            rows[name].append(torch.stack([quality, found, one.labels == true, named == true]))
    print(f"{args.images} images with {instances} instances")
    print("kept, of the instances      found  right by the teacher  by ImageNet's class means")
    for name, columns in rows.items():
        table = torch.cat(columns, dim=1)
        table = table[:, table[0].argsort(descending=True)]
        for fraction in FRACTIONS:
            found, right, named = table[1:, : round(fraction * instances)].mean(dim=1).tolist()
            print(f"{name:26} {fraction:.2f}  {found:.3f}  {right:.3f}  {named:.3f}")
    _, val_set, _ = parts.open_parts(settings)
    report, results = ap.evaluate(net, val_set, "cpu")
    truth = val_set.coco(range(len(val_set)))
    again = renamed(encoder, val_set, results)
    print(f"validation AP, mask and box: {report['mask']['AP']:.1f} {report['box']['AP']:.1f}")
    mask, box = (ap.average_precision(truth, again, kind)[0]["AP"] for kind in ("segm", "bbox"))
    print(f"with the class means' names: {mask:.1f} {box:.1f}")


if __name__ == "__main__":
    main()
