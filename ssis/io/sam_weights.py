r"""SAM's weights: where they are, whether they are whole, and the tiny architecture.

Official weights are Meta's files (`CHECKPOINTS`), which the user fetches: the smallest
is 375 MB. The tiny SAM comes with the project; `python -m ssis sam` trains another.

Read next: `ssis/sam.py`, which uses them.
"""

import hashlib
from functools import partial
from pathlib import Path

import torch
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from torch import Tensor, nn

from ssis import UserError

# Where the official files are, their sizes in bytes, and their SHA-256.
SOURCE = "https://dl.fbaipublicfiles.com/segment_anything/"
CHECKPOINTS = {
    "vit_b": (
        "sam_vit_b_01ec64.pth",
        375_042_383,
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    "vit_l": (
        "sam_vit_l_0b3195.pth",
        1_249_524_607,
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "vit_h": (
        "sam_vit_h_4b8939.pth",
        2_564_550_879,
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
}
TINY = Path(__file__).parent.with_name("tiny_sam.pt")


def find(kind: str, checkpoint: str) -> Path:
    """Path of a SAM's checkpoint.

    Args:
        kind: "tiny", "vit_b", "vit_l" or "vit_h".
        checkpoint: path; empty: the built-in one, of "tiny" only.

    Raises:
        UserError: there is none; says what to fetch.
    """
    path = Path(checkpoint or TINY)
    if (checkpoint or kind == "tiny") and path.is_file():
        return path
    advice = "leave --sam-checkpoint out"
    if kind != "tiny":
        name, size, checksum = CHECKPOINTS[kind]
        advice = (
            f"fetch {SOURCE}{name} ({size / 1e6:.0f} MB, SHA-256 {checksum[:8]}...), "
            "or give --method pl-dc, which needs no SAM"
        )
    wrong = f"{checkpoint}: not found" if checkpoint else "PATH: needed"
    raise UserError(f"--sam {kind} --sam-checkpoint {wrong}; {advice}")


def read(kind: str, path: Path) -> dict:
    """The content of a SAM's checkpoint, without running code from it.

    Returns:
        `model` (the state dict), `fingerprint` (a hash of the file), and of the tiny
        one `side` and `patch`, see `build_tiny`.

    Raises:
        UserError: the file cannot be read, or is of another kind.
    """
    fingerprint = hashlib.blake2b()
    try:
        with path.open("rb") as file:
            # Piece by piece: the largest file has 2.6 GB.
            for piece in iter(partial(file.read, 2**20), b""):
                fingerprint.update(piece)
        state = torch.load(path, map_location="cpu", weights_only=True)
    # Every exception: a damaged file can make the reader fail in any way.
    except Exception as error:
        raise UserError(
            f"--sam-checkpoint {path}: cannot be read as a state dict "
            f"({(str(error) or type(error).__name__).splitlines()[0][:100]})"
        ) from error
    if kind != "tiny":
        # Meta's files are the bare state dict.
        state = dict(model=state)
    wanted = {"model", "side", "patch"} if kind == "tiny" else {"model"}
    if not isinstance(state, dict) or not wanted <= state.keys():
        raise UserError(f"--sam-checkpoint {path}: not of --sam {kind}")
    if not isinstance(state["model"], dict) or not all(
        isinstance(value, Tensor) and value.is_floating_point()
        for value in state["model"].values()
    ):
        raise UserError(f"--sam-checkpoint {path}: not a dict of tensors")
    return dict(state, fingerprint=fingerprint.hexdigest())


def build_tiny(side: int, patch: int) -> Sam:
    """The untrained tiny SAM, 1.3 M parameters.

    Args:
        side: of the square frame that images are resized into, pixels.
        patch: side of a patch, pixels; masks have side / patch * 4 pixels on a side.
    """
    width, cells = 96, side // patch
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=side,
            patch_size=patch,
            embed_dim=128,
            depth=5,
            num_heads=2,
            mlp_ratio=3,
            out_chans=width,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            # Relative positions take half of the encoder's time on a CPU.
            use_rel_pos=False,
            # Edges are local: three of the five blocks look at 8 x 8 patches only.
            window_size=8,
            global_attn_indexes=(1, 4),
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=width,
            image_embedding_size=(cells, cells),
            input_image_size=(side, side),
            mask_in_chans=8,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(
                depth=2, embedding_dim=width, mlp_dim=256, num_heads=4
            ),
            transformer_dim=width,
            iou_head_depth=2,
            iou_head_hidden_dim=96,
        ),
    )
