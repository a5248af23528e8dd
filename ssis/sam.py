r"""Segment Anything: official checkpoints and the tiny built-in one.

SAM (Kirillov et al., arXiv 2304.02643) turns a point into a mask: it knows where things
end, but not what they are. It has three parts:

    image encoder      the image into an embedding of 64 x 64 cells; seconds on a CPU, a
                       tenth of a second on a large GPU
    prompt encoder     points into tokens; next to nothing
    mask decoder       embedding and tokens into three masks; milliseconds

Only the first one is slow, and it sees no prompt. Hence the rule of this file:

*One encoding per image.* SAM always sees the original image, never a view of it. So
there is one embedding per image, which `ssis/io/embeddings.py` keeps, in memory and on
disk.

*Frames.* Prompts are given in the original frame, in continuous coordinates: the center
of the first pixel is 0.5. SAM's own frame is a square of `side` pixels (1024; the tiny
one 96). The image is resized to it by its long side, and padded below or to the right.

*What the method takes from SAM.* Refinement (`ssis/refine.py`) uses the masks
(`candidates`). Structural distillation (`ssis/sam_distill.py`) uses the image features
inside of the mask decoder (`features`).

The models (`--sam`): `vit_b`, `vit_l`, `vit_h`, from Meta's files, by
`segment_anything` itself; and `tiny`, which belongs to the built-in dataset
(`ssis/tools/train_tiny_sam.py`) and comes with the project. Their files are read in
`ssis/io/sam_weights.py`. S4M's released code has SAM 2.

    python -m ssis sam --out FILE        trains another tiny one (--help says more)

Chain: 11 of 24. Read next: `ssis/refine.py`, the first of its two uses.
"""

import numpy as np
import torch
from segment_anything import sam_model_registry
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor

from ssis.io.checkpoint import check_fits
from ssis.io.sam_weights import build_tiny, find, read

# Prompts decoded together: 16 at 64 x 64 x 256 are 64 MB a tensor.
CHUNK = 16


class SegmentAnything:
    """A frozen SAM.

    Not a module: its weights belong neither into a checkpoint nor to an optimizer.

    Args:
        kind: "tiny", "vit_b", "vit_l" or "vit_h".
        checkpoint: path of its weights; empty: the built-in ones, of "tiny" only.
        device: where it runs.

    Attributes:
        net: `segment_anything.modeling.Sam`, in evaluation mode.
        side: of its frame, pixels.
        cells: of its feature map, on a side.
        fingerprint: of its weights.
        entry_bytes: size of an embedding, in 16 bits, and of its checksum.

    Raises:
        UserError: no checkpoint, or one that is of another model.
    """

    def __init__(self, kind: str, checkpoint: str, device):
        path = find(kind, checkpoint)
        state = read(kind, path)
        # The tiny one says in its file how large it is; the official ones have names.
        self.net = (
            build_tiny(state["side"], state["patch"])
            if kind == "tiny"
            else sam_model_registry[kind]()
        )
        # vit_b's weights in vit_l would be a wall of missing keys; one line says it.
        message = f"--sam-checkpoint {path}: not of --sam {kind}"
        check_fits(self.net.state_dict(), state["model"], message)
        # The file's tensors become the weights, instead of a second copy of them.
        self.net.load_state_dict(state["model"], assign=True)
        # Frozen: S4M asks SAM, and never trains it. (The tiny one's file has 16 bits.)
        self.net.to(device).float().eval().requires_grad_(False)
        self.device = torch.device(device)
        self.side = self.net.image_encoder.img_size
        self.cells = self.net.prompt_encoder.image_embedding_size[0]
        self.fingerprint = state["fingerprint"]
        self.entry_bytes = 2 * self.net.prompt_encoder.embed_dim * self.cells**2 + 16

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """The embedding of an original image.

        Args:
            image: (3, H, W) uint8, on the CPU.

        Returns:
            (D, cells, cells) float16, on the CPU.
        """
        # The library's own resizing, by Pillow: what the weights were trained for.
        pixels = ResizeLongestSide(self.side).apply_image(
            image.permute(1, 2, 0).numpy()
        )
        pixels = torch.as_tensor(np.ascontiguousarray(pixels)).permute(2, 0, 1)
        # Normalized, and padded with 0 to the square.
        frame = self.net.preprocess(pixels.to(self.device).float())
        # On a GPU in TF32, as its tensor cores compute: it has 11 bits, as has float16,
        # which is kept. (In bf16, with 8, 3 % of the tiny SAM's mask pixels differ.)
        precision = torch.get_float32_matmul_precision()
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        try:
            embedding = self.net.image_encoder(frame[None])[0]
        finally:
            torch.set_float32_matmul_precision(precision)
        # 16 bits and the CPU: half the size, and no GPU memory for thousands of images.
        return embedding.half().cpu()

    def on_device(self, embedding: Tensor) -> Tensor:
        """An embedding of `encode` for the decoder: (1, D, cells, cells) float32."""
        # From pinned memory the GPU fetches it while the host goes on.
        if self.device.type == "cuda":
            embedding = embedding.pin_memory()
        return embedding.to(self.device, non_blocking=True).float()[None]

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width in SAM's frame of an original of this size."""
        return ResizeLongestSide.get_preprocess_shape(*size, self.side)

    def prompt(self, points: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """What the prompt encoder makes of points.

        Args:
            points: (N, K, 2) float, x and y in the original frame; all on the object.
            size: of the original, height and width.

        Returns:
            sparse (N, K + 1, D): a token for each point, and one that says "no box".
            dense (N, D, cells, cells): what is added to the image, here "no mask".
        """
        # The two sides are scaled separately: each is rounded to whole pixels.
        height, width = self.resized(size)
        x, y = points.to(self.device).unbind(dim=-1)
        points = torch.stack([x * (width / size[1]), y * (height / size[0])], dim=-1)
        # The library's prompt encoder, written out for points alone: it looks for every
        # kind of prompt, also for those that are not there, and waits for a GPU each
        # time. A token says where a point is, and that it is on the object (embedding 0
        # would say beside it; S4M has only points on it).
        encoder, count = self.net.prompt_encoder, len(points)
        where = encoder.pe_layer.forward_with_coords(points, encoder.input_image_size)
        on_object = where + encoder.point_embeddings[1].weight
        no_box = encoder.not_a_point_embed.weight.expand(count, 1, -1)
        no_mask = encoder.no_mask_embed.weight[:, :, None, None]
        no_mask = no_mask.expand(count, -1, *encoder.image_embedding_size)
        return torch.cat([on_object, no_box], dim=1), no_mask

    @torch.no_grad()
    def candidates(
        self,
        embedding: Tensor,
        points: Tensor,
        size: tuple[int, int],
        out: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """SAM's three answers to each prompt.

        Args:
            embedding: of `encode`.
            points: (N, K, 2), K points of each of N objects, original frame.
            size: of the original.
            out: size in which the masks are wanted: the original's, or that of a view
                (not flipped), so that they are resized only once.

        Returns:
            logits (N, 3, H, W) float32, above 0 on the object; predicted IoU (N, 3).
        """
        sparse, dense = self.prompt(points, size)
        # One embedding for all N prompts: the decoder repeats it, not the encoder.
        # `multimask_output`: three masks, since a point on a wheel may mean the wheel,
        # the car or the row of cars.
        low, iou = self.net.mask_decoder(
            self.on_device(embedding),
            self.net.prompt_encoder.get_dense_pe(),
            sparse,
            dense,
            multimask_output=True,
        )
        # The decoder's masks have a quarter of the frame's side. Enlarged to the frame,
        # cut to the image (the rest is padding), resized to `out`.
        return self.net.postprocess_masks(low, self.resized(size), out), iou

    @torch.no_grad()
    def features(
        self, embedding: Tensor, points: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """The image as the mask decoder sees it after a prompt.

        The output of the decoder's two-way transformer on the image's side: the
        embedding, after it has attended to the prompt.

        Args:
            embedding: as for `candidates`.
            points: (Q, 2), one a prompt.
            size: as for `candidates`.

        Returns:
            (Q, cells * cells, D) float32.
        """
        # The core of structural distillation. `MaskDecoder.forward` returns masks only,
        # so its first half, up to the transformer, is written out here.
        sparse, dense = self.prompt(points[:, None], size)
        decoder = self.net.mask_decoder
        # The tokens of one prompt, in the order that the weights were trained with:
        #   1 learned token, from which SAM predicts the IoUs of its masks;
        #   4 learned tokens, one for each mask that it can give: one for a prompt that
        #     is clear, three for one that is not;
        #   2 from the prompt encoder: where the point is, and "no box".
        # The first five are the same for every prompt; the point is what differs.
        own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([own.expand(len(points), -1, -1), sparse], dim=1)
        # The image's side: the embedding plus the dense part of the prompt, a learned
        # vector that says "no mask was given"; and where each cell is.
        image = self.on_device(embedding) + dense
        position = self.net.prompt_encoder.get_dense_pe()
        position = position.expand(len(points), -1, -1, -1)
        # Two-way: the tokens attend to the image, and the image to the tokens. So the
        # transformer has two outputs: first the tokens, from which the masks and IoUs
        # would be made, then the image. The second one is S4M's feature: in it, the
        # cells know which object was meant.
        return decoder.transformer(image, position, tokens)[1]
