"""Evaluates an untrained model in several processes; the body of a test in test_distributed.py.

python tests/report/gloo_evaluate.py OUT FOLDER             one process
torchrun --nproc_per_node 3 tests/report/gloo_evaluate.py OUT FOLDER
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from ssis import distributed, networks
from ssis.datasets import coco_json
from ssis.report import ap


def main(out: str, folder: str) -> None:
    torch.set_num_threads(1)
    rank, world_size, device = distributed.start("cpu")
    dataset = coco_json.load_coco(f"{folder}/coco.json", f"{folder}/images")
    torch.manual_seed(0)
    net = networks.build_small(2, 48, 96).eval()
    # An untrained model's scores are low.
    net.roi_heads.score_thresh, net.roi_heads.detections_per_img = 0.05, 10
    report, results = ap.evaluate(net, dataset, device, rank, world_size)
    if rank == 0:
        Path(out).write_text(json.dumps(dict(report=report, results=results)))
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
