r"""What a training step works on: models, optimizer, precision, memory of the levels.

The state of a run in one object without behavior: `train.py` says what happens to it,
`ssis/io/checkpoint.py` saves and restores it.

Read next: `train.py`.
"""

import torch
from torch.optim.lr_scheduler import LambdaLR

from ssis import config, correction, distributed, filters, model
from ssis.engine import guard
from ssis.report import audit
from ssis import optimizer, sam, sam_distill, teacher


class Run:
    """Built once by `train.train`.

    Attributes:
        config: the settings.
        rank, world, device: this process, the number of them, where its models are.
        net: the student's network.
        student: the same, wrapped by DDP where there are several processes.
        teacher: the EMA teacher; untrained until the burn-in begins.
        optimizer, schedule: AdamW and its learning rate; `schedule.last_epoch` is the
            number of steps done.
        guard: skips a step that is not finite.
        watch: says when there are next to no pseudo-labels, or far too many.
        autocast, scaler: mixed precision; both do nothing with `--amp off`.
        thresholds: PL-DC's adaptive thresholds.
        second: PL-DC's second classifier, or None.
        embeddings: SAM's, of the training images, or None.
        structure: what S4M's structural distillation compares with, or None.

    Args:
        settings: of the run.
        train_set: for the classes, and for SAM, who looks at the original images.
        start: rank, number of processes and device, of `distributed.start`.
    """

    def __init__(self, settings: config.Config, train_set, start: tuple):
        self.config, names = settings, train_set.names
        self.rank, self.world, self.device = start
        # Same seed on all processes: the same first weights. Then, below, one of each
        # rank, for the sampling of anchors and proposals.
        torch.manual_seed(settings.seed)
        self.net = model.build(settings, len(names) + 1).to(self.device).train()
        self.student = distributed.wrap(self.net, self.device)
        self.teacher = teacher.make_teacher(self.net)
        # PL-DC: what the filter and the second opinion remember; see `begin_burnin`.
        self.thresholds = filters.Thresholds(settings, len(names)).to(self.device)
        self.second = correction.make(settings, names, self.net, self.device)
        # S4M: SAM is asked about images of the training set only.
        self.embeddings = self.structure = None
        if settings.uses_sam:
            asked = sam.SegmentAnything(
                settings.sam, settings.sam_checkpoint, self.device
            )
            self.embeddings = sam.Embeddings(asked, train_set, settings, self.world)
        if settings.structure_weight:
            self.structure = sam_distill.Structure(self.embeddings, settings)
        # After all that draws weights: with and without a second classifier, training
        # draws the same.
        torch.manual_seed(settings.seed * 1000 + 1 + self.rank)
        self.optimizer = optimizer.make(self.net, settings)
        self.schedule = LambdaLR(
            self.optimizer, lambda step: optimizer.lr_factor(step, settings)
        )
        self.guard = guard.Guard(
            self.net,
            train_set.files,
            settings.run_folder,
            settings.amp == "fp16",
            self.rank,
        )
        self.watch = audit.Watch(names, settings.filter, self.rank)
        dtype = torch.float16 if settings.amp == "fp16" else torch.bfloat16
        self.autocast = torch.autocast(
            self.device.type, dtype, enabled=settings.amp != "off"
        )
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=settings.amp == "fp16"
        )
