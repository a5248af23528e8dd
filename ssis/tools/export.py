r"""A trained model for the world outside: plain torchvision, and ONNX.

    python -m ssis export runs/<name>/checkpoint.pt --out FOLDER [--onnx] [--check]

The folder gets `weights.pt`, a state dict of torchvision's Mask R-CNN, `model.py`,
which builds that model and loads the weights with torch and torchvision alone, and with
`--onnx` `model.onnx`: an image (3, H, W) of float32 RGB in [0, 1], of any usual size,
to boxes (N, 4), labels (N,), scores (N,) and soft masks (N, 1, H, W). One image at a
time: the runtime refuses a batch.

The weights are the same, and so are the boxes of an image that needs no resizing. But
masks are pasted by torchvision's own code, which widens each by up to a pixel
(`inference.paste`), and images are resized without antialiasing. Small objects lose AP:
`--check` evaluates both models on the run's test part (docs/log.md has numbers).

`torch.export` cannot take this model: torchvision's non-maximum suppression branches on
values (pytorch/vision issues 9306 and 9321). The ONNX file is made by the tracing
exporter (`dynamo=False`), which torchvision supports.

Read next: `ssis/networks.py`, where the small model is built.
"""

import argparse
import importlib.util
import inspect
import warnings
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from ssis import UserError, model, networks
from ssis.datasets import coco_json, parts, rle
from ssis.engine import resume
from ssis.io import program
from ssis.io.files import whole, write_text, writing
from ssis.report import ap

# What tells an exported `model.py` from any other.
MARK = "as a plain torchvision model."
# The file that is written beside the weights. Its builder of the small model is copied
# from `networks.build_small`.
SMALL = '''"""{title}

    from model import CLASSES, load
    detections = load()([image])[0]      # image (3, H, W) float in [0, 1], RGB

Needs torch and torchvision. Labels count from 1: CLASSES[label - 1].
"""

from pathlib import Path

import torch
from torch import nn
from torchvision.models import resnet
from torchvision.models.detection import MaskRCNN, mask_rcnn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

CLASSES = {names!r}


{builder}

def load(weights=Path(__file__).with_name("weights.pt")):
    """The model in evaluation mode, on the CPU."""
    model = build_small({num_classes}, {short_side}, {long_side})
    set_detections(model, {detections})
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval()
'''

RESNET50 = '''"""{title}

    from model import CLASSES, load
    detections = load()([image])[0]      # image (3, H, W) float in [0, 1], RGB

Needs torch and torchvision. Labels count from 1: CLASSES[label - 1].
"""

from pathlib import Path

import torch
from torch import nn
from torchvision.models.detection import maskrcnn_resnet50_fpn

CLASSES = {names!r}


{limit}

def load(weights=Path(__file__).with_name("weights.pt")):
    """The model in evaluation mode, on the CPU."""
    model = maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes={num_classes},
        min_size={short_side},
        max_size={long_side},
    ){norms}
    set_detections(model, {detections})
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval()
'''
# COCO's published weights were trained with norms without epsilon (`networks.build`).
NO_EPSILON = """
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.eps = 0.0"""


def model_text(
    config, names: list[str], title: str, no_epsilon: bool, detections: int = 100
) -> str:
    """The text of `model.py`.

    Args:
        config: of the run.
        names: class names.
        title: its first line.
        no_epsilon: the norms have none.
        detections: of an image, at most.
    """
    return (SMALL if config.model == "small" else RESNET50).format(
        title=title,
        names=names,
        num_classes=len(names) + 1,
        short_side=config.short_side,
        long_side=config.long_side,
        detections=detections,
        builder="\n\n".join(
            inspect.getsource(part)
            for part in (
                networks.build_small,
                networks.light_heads,
                networks.set_detections,
            )
        ),
        limit=inspect.getsource(networks.set_detections),
        norms=NO_EPSILON if no_epsilon else "",
    )


def weights(net: model.MaskRCNN) -> dict[str, torch.Tensor]:
    """The weights under torchvision's names, as its trainable norms expect them.

    A frozen norm does not count batches; the trainable one, which computes the same in
    evaluation, has a counter.
    """
    state = {name: value.cpu() for name, value in net.state_dict().items()}
    for name in list(state):
        counter = name.removesuffix("running_mean") + "num_batches_tracked"
        if name.endswith("running_mean") and counter not in state:
            state[counter] = torch.tensor(0)
    return state


def load_plain(folder: Path) -> nn.Module:
    """The model that an exported `model.py` loads."""
    spec = importlib.util.spec_from_file_location("exported", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load()


def write_onnx(net: nn.Module, path: Path) -> None:
    """Write an ONNX file of torchvision's Mask R-CNN.

    Args:
        net: in evaluation mode, on the CPU.
        path: the file.
    """
    side = net.transform.min_size[-1]
    # The input of the trace; only its shape matters.
    image = torch.zeros(3, side, side)
    size = {1: "height", 2: "width"}
    each = {0: "instances"}
    axes = dict(image=size, boxes=each, labels=each, scores=each)
    axes["masks"] = {0: "instances", 2: "height", 3: "width"}
    with warnings.catch_warnings(), whole(path) as temporary:
        # The tracer warns that Python values become constants. Those of this model are.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net,
            ([image],),
            str(temporary),
            dynamo=False,
            opset_version=17,
            input_names=["image"],
            output_names=["boxes", "labels", "scores", "masks"],
            dynamic_axes=axes,
        )


@torch.no_grad()
def detect(plain: nn.Module, image: torch.Tensor) -> list[dict]:
    """The exported model's detections in an image (3, H, W) uint8, as COCO results."""
    output = plain([image.float() / 255])[0]
    boxes = output["boxes"]
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
    results = []
    columns = (
        boxes,
        output["labels"].tolist(),
        output["scores"].tolist(),
        output["masks"],
    )
    for box, label, score, mask in zip(*columns, strict=True):
        encoded = rle.encode(mask[0].numpy() > 0.5)
        row = dict(bbox=box, category_id=label, score=score, segmentation=encoded)
        results.append(row)
    return results


def compare(net: model.MaskRCNN, plain: nn.Module, config, names: list[str]) -> None:
    """Print the AP of this project's model and of the exported one."""
    dataset = coco_json.load_coco(*parts.part_paths(config, "test"), names)
    indices = list(range(len(dataset)))
    ours = ap.predictions(net, dataset, indices, torch.device("cpu"))
    theirs = [
        dict(detection, image_id=index)
        for index in tqdm(indices, unit="image")
        for detection in detect(plain, dataset.image(index))
    ]
    ground_truth, limit = dataset.coco(indices), net.roi_heads.detections_per_img
    for who, results in (("ssis", ours), ("exported", theirs)):
        mask, box = (
            ap.average_precision(ground_truth, results, kind, limit)[0]["AP"]
            for kind in ("segm", "bbox")
        )
        print(f"{who:<9} mask AP {mask:.2f}, box AP {box:.2f}, {len(dataset)} images")


def run(argv: list[str] | None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ssis export",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    resume.add_model_flags(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--onnx", action="store_true", help="an ONNX file too")
    parser.add_argument(
        "--check", action="store_true", help="AP of both on the run's test part"
    )
    args = parser.parse_args(argv)
    if args.onnx and not importlib.util.find_spec("onnx"):
        raise UserError("--onnx: needs a further package; pip install onnx")
    net, config, names, who = resume.load_model(args.checkpoint, args.who)
    if config.model == "timm":
        raise UserError(
            f"{args.checkpoint}: has a backbone of timm, which torchvision does not; "
            "use python -m ssis predict, or train --model small or resnet50"
        )
    title = f"The {who} of {args.checkpoint.name}, {MARK}"
    no_epsilon = config.model == "resnet50" and config.backbone_weights == "coco"
    target = args.out / "model.py"
    if target.exists() and MARK not in target.read_text(
        encoding="utf-8", errors="replace"
    ):
        raise UserError(
            f"{target}: is there and was not exported; choose another --out"
        )
    with writing(args.out, "--out"):
        args.out.mkdir(parents=True, exist_ok=True)
        with whole(args.out / "weights.pt") as temporary:
            torch.save(weights(net), temporary)
        limit = net.roi_heads.detections_per_img
        text = model_text(config, names, title, no_epsilon, limit)
        write_text(args.out / "model.py", text)
    plain = load_plain(args.out)
    print(f"{args.out}/weights.pt and {args.out}/model.py: {who}, {len(names)} classes")
    if args.check:
        compare(net, plain, config, names)
    if args.onnx:
        with writing(args.out / "model.onnx", "--out"):
            write_onnx(plain, args.out / "model.onnx")
        print(f"{args.out}/model.onnx")


def main(argv: list[str] | None = None) -> None:
    """`run`, with one line and status 2 for what the user did wrong."""
    program.run(run, argv)
