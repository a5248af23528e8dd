r"""Backbones of the timm library: an optional package, its weights checked.

Read next: `ssis/networks.py`, which puts an FPN and heads on them.
"""

import logging

from torch import nn

from ssis import UserError
from ssis.io.backbone_weights import load_matching, read_weights

# Strides of the maps that a detector's FPN begins with.
STRIDES = (4, 8, 16, 32)


def load(name: str, weights: str) -> tuple[nn.Module, list[float], list[float]]:
    """A backbone with maps of stride 4, 8, 16 and 32.

    Args:
        name: as timm has it, such as tf_efficientnet_lite0.
        weights: "none", "imagenet" (downloaded by timm), or the path of a state dict of
            the whole classifier with timm's names.

    Returns:
        The backbone, and the mean and deviation that images are normalized with, RGB.

    Raises:
        UserError: no timm, no such backbone, no such maps, or weights that do not fit.
    """
    try:
        # Imported here: an optional package.
        import timm
    except ImportError as error:
        raise UserError(
            "--model timm: needs a further package; pip install timm, or take --model "
            "small --backbone-weights none"
        ) from error
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[-1]}*")[:3] if name else []
        advice = f", such as {', '.join(near)}" if near else ""
        raise UserError(
            f"--backbone {name or '(none)'}: timm has no such model; give a name of "
            f"timm.list_models(){advice}"
        )
    # It would list the classifier's layers, which a detector has no use for.
    logging.getLogger("timm").setLevel(logging.ERROR)
    given = {}
    if weights != "none":
        given["pretrained"] = True
    if weights not in ("none", "imagenet"):
        # timm itself would pass over a file that does not fit. The file is of the whole
        # network, so it is tried on that first.
        whole = timm.create_model(name, num_classes=0)
        load_matching(whole, read_weights(weights), weights)
        given["pretrained_cfg_overlay"] = dict(file=weights)
    try:
        body = timm.create_model(name, features_only=True, **given)
        strides = body.feature_info.reduction()
        if not set(STRIDES) <= set(strides):
            raise UserError(
                f"--backbone {name}: has maps of stride {strides}, not of {STRIDES}; "
                "give a convolutional one"
            )
        levels = [strides.index(stride) for stride in STRIDES]
        if levels != list(range(len(strides))):
            body = timm.create_model(
                name, features_only=True, out_indices=levels, **given
            )
    # timm's own complaint is an error of one of these kinds, depending on what is
    # wrong: no network, no weights of that name, no way to take maps from the model.
    except (OSError, RuntimeError, AttributeError, ValueError, TypeError) as error:
        line = (
            str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        )
        known = timm.get_pretrained_cfg(name)
        where = getattr(known, "url", "") or getattr(known, "hf_hub_id", "")
        raise UserError(
            f"--backbone {name} --backbone-weights {weights}: timm says: {line}; "
            f"fetch the weights elsewhere ({where}) and give their PATH, or take "
            "another backbone"
        ) from error
    settings = timm.get_pretrained_cfg(name)
    return body, list(settings.mean), list(settings.std)


def freeze(body: nn.Module, trained_stages: int) -> nn.Module:
    """The backbone with constant norms and constant first stages.

    Args:
        body: of `load`.
        trained_stages: as torchvision counts them: of five, which end with the maps of
            stride 2 to 32, so many learn, from the top.
    """
    from timm.utils.model import freeze_batch_norm_2d

    stride = 2 ** (5 - trained_stages)
    modules = [f["module"] for f in body.feature_info.info if f["reduction"] <= stride]
    if modules:
        # Layers are listed in the order in which they compute. timm's wrapper has "_"
        # for "." in the names of stages.
        last = (modules[-1], modules[-1].replace(".", "_"))
        layers = list(body.named_modules())
        end = max(
            k
            for k, (name, _) in enumerate(layers)
            if name in last or name.startswith(tuple(f"{n}." for n in last))
        )
        for _, layer in layers[: end + 1]:
            for parameter in layer.parameters(recurse=False):
                parameter.requires_grad_(False)
    return freeze_batch_norm_2d(body)
