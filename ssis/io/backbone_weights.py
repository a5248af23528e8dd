r"""Pretrained weights for torchvision models: fetched, or read from a file; checked.

Read next: `ssis/networks.py`, which asks for them.
"""

import torch
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from ssis import UserError


def read_weights(weights: str) -> dict[str, Tensor]:
    """The state dict that `--backbone-weights` names; see `networks.build_resnet50`.

    Args:
        weights: "imagenet", "coco", or the path of a state dict.

    Raises:
        UserError: no such file, not a dict of tensors, or no network.
    """
    known = {
        "imagenet": ResNet50_Weights.IMAGENET1K_V1,
        "coco": MaskRCNN_ResNet50_FPN_Weights.COCO_V1,
    }
    if weights not in known:
        try:
            state = load_file(weights)
        # Every exception: a file that is something else can fail in any way.
        except Exception as error:
            raise UserError(
                f"--backbone-weights {weights}: not imagenet, coco, none or a "
                "readable state dict"
            ) from error
        if not isinstance(state, dict) or not all(
            isinstance(value, Tensor) for value in state.values()
        ):
            raise UserError(f"--backbone-weights {weights}: not a dict of tensors")
        return state
    try:
        return known[weights].get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--backbone-weights {weights}: {known[weights].url} cannot be "
            "downloaded; fetch it elsewhere and pass its path, or pass none"
        ) from error


def load_file(path: str) -> dict[str, Tensor]:
    """The content of a state dict's file, .safetensors or PyTorch's own."""
    if path.endswith(".safetensors"):
        # What timm's weights are published as. Imported here: it comes with timm.
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def load_matching(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load what has the same name and shape; UserError when the backbone does not."""
    own = module.state_dict()
    fits = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    # `num_batches_tracked` has no counterpart in frozen norms. Anything else that is
    # missing in the backbone means another architecture.
    lacking = [k for k in own if k not in fits and "predictor" not in k]
    if lacking:
        raise UserError(
            f"--backbone-weights {source}: not of this model, lacks {lacking[0]!r}"
        )
    module.load_state_dict(fits, strict=False)
