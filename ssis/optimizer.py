r"""AdamW and its learning rate.

GD (arXiv 2308.02668), section 4: AdamW of 1e-4 with weight decay 0.05, a tenth of the
step size for the pretrained backbone.

Read next: `ssis/io/checkpoint.py`, which saves their state.
"""

import torch
from torch import nn

from ssis.config import Config


def make(net: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW; smaller steps for the backbone, no decay of biases and norms."""
    groups = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            key = (name.startswith("backbone.body"), parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            dict(
                params=params,
                lr=config.lr * (config.backbone_lr_factor if in_body else 1),
                weight_decay=config.weight_decay if decays else 0.0,
            )
            for (in_body, decays), params in groups.items()
        ]
    )


def lr_factor(step: int, config: Config) -> float:
    """Warm-up, constant, linearly to 0; once for pretraining, once for the rest.

    A teacher whose own training was not finished would label badly, so pretraining has
    an end of its own.
    """
    pretrain, _, total = config.stage_ends
    first, last = (0, pretrain) if step < pretrain else (pretrain, total)
    warm = min(1.0, (step - first + 1) / max(1, config.warmup_steps))
    # A student that goes on from the teacher's weights is warm already.
    if first and config.burnin_init == "teacher":
        warm = 1.0
    done = (step - first) / max(1, last - first)
    return warm * min(1.0, (1 - done) / (1 - config.decay_at))
