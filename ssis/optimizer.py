r"""AdamW and its learning rate.

GD (arXiv 2308.02668), section 4: AdamW of 1e-4 with weight decay 0.05, a tenth of the
step size for the pretrained backbone, whose features need to change least.

The learning rate rises over the first steps, stays, and falls linearly to 0. With t
steps of T done in a part of the run, W warm-up steps, and the fall from d T on, it is
the base rate times

$$\min\left(1, \frac{t + 1}{W}\right) \cdot
  \min\left(1, \frac{1 - t / T}{1 - d}\right)$$

once for pretraining and once for the rest: a teacher whose own training was not
finished would label badly, so pretraining has an end of its own.

Chain: 13 of 16. Read next: `ssis/distributed.py`, the same step on several processes.
"""

import torch
from torch import nn


def make(
    net: nn.Module, lr: float, backbone_lr_factor: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW; smaller steps for the backbone, no decay of biases and norms.

    Args:
        net: the student, without DDP's wrapper; frozen weights are left out.
        lr: step size of what is not the backbone.
        backbone_lr_factor: times `lr` is that of the backbone.
        weight_decay: AdamW's, of the weights of layers.
    """
    groups = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            # Biases, and the scales of norms, are vectors. Decay pulls weights towards
            # 0, which keeps a layer simple; it would only pull a norm's scale away from
            # 1, and a bias does not make a function less smooth.
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
    decay_at: float,
    rewarm: bool,
) -> float:
    """The learning rate of a step, as a fraction of the base rate.

    Args:
        step: steps done.
        pretrain_end, total: steps at which pretraining and the run end.
        warmup_steps: W; AdamW's second moments are noise at first.
        decay_at: d, in [0, 1).
        rewarm: whether the student starts afresh after pretraining.

    Returns:
        A factor in [0, 1].
    """
    first, last = (0, pretrain_end) if step < pretrain_end else (pretrain_end, total)
    warm = min(1.0, (step - first + 1) / max(1, warmup_steps))
    # A student that goes on from the teacher's weights is warm already.
    if first and not rewarm:
        warm = 1.0
    done = (step - first) / max(1, last - first)
    return warm * min(1.0, (1 - done) / (1 - decay_at))
