r"""Which number says that something is there? The measurement behind ssis Eq. (found).

    python docs/bench/found.py runs/<name>/pretrained.pt [--images 300]

On unlabeled images whose ground truth is known, the first teacher's predictions are sorted

* by the class quality c, each class for itself, as torchvision does;
* by c, with one candidate for each object, whatever its class;
* by the foreground quality o, with one candidate for each object (`filters.objects`).

Printed, for as many of the best predictions as are a given fraction of the true instances: the
fraction that lies on an instance (box IoU >= 0.5), and the fraction that also has its class, from
the teacher and from `imagenet.ClassMeans`.
"""

import argparse

import torch
from category_classifiers import first_teacher
from torchvision.ops import nms

from ssis import correction, data, filters, teacher

FRACTIONS = (0.15, 0.25, 0.4, 0.6, 0.8)


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
            partner = data.match(one.boxes, target["boxes"])
            found = partner >= 0
            true = torch.zeros(len(one), dtype=torch.int64)
            true[found] = target["labels"][partner[found]]
            named = encoder(image, one).argmax(dim=1) + 1
            rows[name].append(torch.stack([quality, found, one.labels == true, named == true]))
    print(f"{args.images} images with {instances} instances")
    print("kept, of the instances      found  right by the teacher  by ImageNet's class means")
    for name, parts in rows.items():
        table = torch.cat(parts, dim=1)
        table = table[:, table[0].argsort(descending=True)]
        for fraction in FRACTIONS:
            found, right, named = table[1:, : round(fraction * instances)].mean(dim=1).tolist()
            print(f"{name:26} {fraction:.2f}  {found:.3f}  {right:.3f}  {named:.3f}")


if __name__ == "__main__":
    main()
