r"""AdamW and its learning rate.

All three papers: AdamW at 1e-4. GD and S4M have weight decay 0.05, and a tenth of the
learning rate for the pretrained backbone, whose features need to change least; PL-DC
has weight decay 1e-4 and a frozen backbone. `ssis/presets.py` says what the presets
have for Mask R-CNN, and whose recipes they follow.

The learning rate rises over the first W steps. How it falls (`--lr-schedule`), with t
of T steps of a part of the run done:

    linear    constant until the fraction d of T, then linearly to 0:
              min(1, (1 - t/T) / (1 - d))
    step      to a tenth at d, to a hundredth at a second fraction (COCO)
    poly      (1 - t/T)^0.9 from the start (Cityscapes; GD, S4M)

A run has two such parts, pretraining and the rest. A teacher trained with a learning
rate that never fell would label badly, so pretraining has a fall of its own; in GD and
S4M it is a training run of its own. In PL-DC the student simply goes on, so the run is
one part (`--no-lr-restart`).

Chain: 21 of 24. Read next: `ssis/distributed.py`, the same step on several processes.
"""

import torch
from torch import nn


def make(
    net: nn.Module, lr: float, backbone_lr_factor: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW; smaller steps for the backbone, no decay of biases and norms.

    Args:
        net: the student, without DDP's wrapper; frozen weights are left out.
        lr: the base rate, of everything but the backbone.
        backbone_lr_factor: the backbone's rate is `lr` times this.
        weight_decay: AdamW's, of the weights of layers.
    """
    groups = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            # Weight decay pulls weights towards 0, so that a layer's output depends
            # less on each input. A bias multiplies no input, so there is nothing to
            # gain; and the scale of a norm belongs near 1, not 0. Both are vectors;
            # the weights of layers have two dimensions or more.
            key = (name.startswith("backbone.body"), parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            dict(
                params=params,
                lr=lr * (backbone_lr_factor if in_body else 1),
                weight_decay=weight_decay if decays else 0.0,
            )
            for (in_body, decays), params in groups.items()
        ]
    )


def lr_factor(
    step: int,
    pretrain_end: int,
    total: int,
    warmup_steps: int,
    schedule: str,
    decay_at: float,
    decay_again_at: float,
    restart: bool,
    rewarm: bool,
    after: float = 1.0,
) -> float:
    """The learning rate of a step, as a fraction of the base rate.

    Args:
        step: steps done.
        pretrain_end, total: steps at which pretraining and the run end.
        warmup_steps: W. At first AdamW's estimates of the gradients' size rest on a few
            steps, and large steps would be taken in random directions.
        schedule: "linear", "step" or "poly".
        decay_at: d, in [0, 1).
        decay_again_at: the second fraction of "step", in [0, 1].
        restart: whether pretraining is a part of its own.
        rewarm: whether the student starts afresh after pretraining.
        after: factor of all rates after pretraining.

    Returns:
        A factor in [0, max(1, after)].

    Raises:
        ValueError: an unknown schedule.
    """
    # The part of the run that the step belongs to: t = step - first, T = last - first.
    first, last = 0, total
    if restart:
        first, last = (
            (0, pretrain_end) if step < pretrain_end else (pretrain_end, total)
        )
    warm = min(1.0, (step - first + 1) / max(1, warmup_steps))
    # A student that goes on from its pretrained weights needs no second warm-up.
    if first and not rewarm:
        warm = 1.0
    warm *= after if step >= pretrain_end else 1.0
    done = (step - first) / max(1, last - first)
    if schedule == "linear":
        return warm * min(1.0, (1 - done) / (1 - decay_at))
    if schedule == "step":
        return warm * 0.1 ** ((done >= decay_at) + (done >= decay_again_at))
    if schedule == "poly":
        return warm * (1 - done) ** 0.9
    raise ValueError(f"no schedule {schedule!r}: linear, step or poly")
