r"""S4M: structural distillation (SD) from SAM into the teacher.

While the first teacher is trained, on the labeled images, its feature map learns SAM's
*layout*: locations that look alike to SAM (because they lie on one object) should look
alike to the teacher. Of each feature map F only the self-similarity is compared,

$$C(i, j) = \cos(F_i, F_j)$$ S4M Eq. (similarity)

$$L_{SD} = \mathrm{mean}_{i, j} \; \mathrm{Huber}(C_{SAM}(i, j) - C_T(i, j))$$
S4M Eq. (SD)

$$L_T = L_{\mathrm{labeled}} + \lambda_{SD} \, L_{SD}$$ S4M Eq. (teacher)

with $\lambda_{SD}$ = `structure_weight`, i a query point, and j all locations of the
image, as far as the view shows them. Why not compare the features themselves? SAM's
features know no classes, and a teacher that copies them loses its own (S4M's ablation).

An example: i lies on a zebra. To SAM the whole zebra is alike, whatever the stripe, and
unlike the grass. To a young teacher a black stripe is like any other black thing. L_SD
asks for SAM's pattern, and leaves open which feature values make it.

*SAM's side.* Each query point i is one prompt, and F is the image feature map after the
mask decoder's two-way transformer, which knows that prompt (`sam.features`): the
decoder's features, not the encoder's (the ablation again). So each row C(i, .) comes
from a map of its own.

*The teacher's side.* The FPN's stride-4 level takes the part of Mask2Former's pixel
decoder in the paper. It is sampled at the centers of SAM's cells, which undoes flip,
crop, resizing and padding of the view in one step. Cells whose center lies in SAM's
padding, or outside of a cropped view, do not count. (The released code has the padding
in both maps, and on padded views of COCO takes the cell of a point from another scale.)

*Query points.* Half of them lie in the union of the ground-truth masks, half anywhere
(released code: 64 + 64). The fraction `structure_boundary` of the first half is drawn
from a band around the edges of the masks, where the layout is decided.

*Cost.* A row costs a pass of 64 x 64 x 256 numbers through the transformer, but depends
on the image and the point alone. So each image gets its query points once, and its rows
(128 x 4096 at 16 bits: 1 MB) are kept in memory while there is room beside the
embeddings; other rows are computed again. The released code draws new points in every
step (docs/differences.md).

Chain: 20 of 24. Read next: `ssis/optimizer.py`, which follows the gradient.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ssis.augment import Geometry
from ssis.io.embeddings import Embeddings
from ssis.sam import CHUNK, SegmentAnything

# Half the width of the boundary band, as a fraction of the image's longer side.
BAND = 0.01


def query_points(
    masks: Tensor, count: int, boundary: float, generator: torch.Generator
) -> Tensor:
    """Query points of an original image.

    Args:
        masks: (N, H, W) uint8, the ground truth; N may be 0.
        count: Q; the first half on the objects, the others anywhere.
        boundary: fraction of the first half that is drawn from the band around the
            edges.
        generator: of the draw, on the CPU.

    Returns:
        (Q, 2) float, x and y; the first pixel's center is 0.5.
    """
    # Three maps of weights to draw from: anywhere, on some object, near an edge.
    height, width = masks.shape[-2:]
    anywhere = torch.ones(height, width)
    inside = masks.bool().any(dim=0).float()
    band = torch.zeros(height, width)
    if len(masks) and boundary:
        # The largest value nearby of the mask and of its negative (minus the smallest
        # value). Their sum is 1 where both a 0 and a 1 are near, and 0 elsewhere.
        reach = max(1, round(BAND * max(height, width)))
        soft = masks.float()[:, None]
        band = (spread(soft, reach) + spread(-soft, reach))[:, 0].amax(dim=0)
    on_edge = round(count // 2 * boundary)
    # `multinomial` takes 2^24 weights at most: a large photograph is thinned out.
    step = math.ceil(math.sqrt(height * width / 2**24))
    parts = []
    for weights, number in (
        (band, on_edge),
        (inside, count // 2 - on_edge),
        (anywhere, count - count // 2),
    ):
        weights = weights[::step, ::step]
        if number:
            # Without an object, or without an edge, these points lie anywhere too.
            weights = weights if weights.any() else anywhere[::step, ::step]
            index = torch.multinomial(
                weights.flatten(), number, True, generator=generator
            )
            width = weights.shape[1]
            parts.append(torch.stack([index % width, index // width], dim=1) * step)
    return torch.cat(parts).float() + 0.5


def spread(maps: Tensor, reach: int) -> Tensor:
    """The largest value within `reach` pixels across and down, of maps (N, 1, H, W)."""
    # One direction after the other: a square window of 41 pixels takes 40 times longer.
    across = F.max_pool2d(maps, (1, 2 * reach + 1), 1, (0, reach))
    return F.max_pool2d(across, (2 * reach + 1, 1), 1, (reach, 0))


def similarity(features: Tensor, queries: Tensor) -> Tensor:
    """S4M Eq. (similarity): rows of the self-similarity of one map.

    Args:
        features: (P, D), a feature for each location.
        queries: (Q,) int64, locations.

    Returns:
        (Q, P) in [-1, 1].
    """
    # The cosine is the dot product of vectors of length 1: only the direction of a
    # feature counts, not its strength.
    unit = F.normalize(features, dim=1)
    return unit[queries] @ unit.T


def centers(sam: SegmentAnything, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Which of SAM's cells lie in an image, and where.

    Args:
        sam: whose cells.
        size: height and width of the original.

    Returns:
        rows and columns: the centers (R,), (K,) of the cells whose center is in the
        image, as fractions of its height and width, in (0, 1). The other cells are
        padding. There is at least one of each.
    """
    # SAM scales the long side to its frame and pads below and to the right; its cells
    # divide the frame evenly.
    height, width = sam.resized(size)
    middles = (torch.arange(sam.cells) + 0.5) * sam.side / sam.cells
    # Centers beyond the image lie in the padding, where SAM's features mean nothing.
    rows, columns = middles[middles < height], middles[middles < width]
    # A strip thinner than half a cell still has its first row.
    rows = rows if len(rows) else torch.tensor([height / 2])
    columns = columns if len(columns) else torch.tensor([width / 2])
    return rows / height, columns / width


class Structure:
    """SAM's self-similarity of the labeled images, each row computed once.

    Args:
        embeddings: of the training images; their memory is shared.
        queries: Q, query points of an image.
        boundary: fraction of those on the objects that is drawn from the boundary band.
        seed: of the run.
    """

    def __init__(
        self, embeddings: Embeddings, queries: int, boundary: float, seed: int
    ):
        self.embeddings, self.sam = embeddings, embeddings.sam
        self.count, self.boundary, self.seed = queries, boundary, seed
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Query cells (Q,) int64 and their rows (Q, P) float16 of an image, on the CPU.

        Cells are numbered row by row over those of `centers`.
        """
        # Without room in memory, the same rows are computed again next time.
        if index not in self.memory:
            computed = self.compute(index)
            if not self.embeddings.takes(computed[1].numel() * 2):
                return computed
            self.memory[index] = computed
        return self.memory[index]

    @torch.no_grad()
    def compute(self, index: int) -> tuple[Tensor, Tensor]:
        """What `__getitem__` returns, from SAM."""
        dataset, sam = self.embeddings.dataset, self.sam
        # In the original frame, as always with SAM: it is the same for all views.
        masks = dataset.target(index)["masks"]
        size = tuple(dataset.image(index).shape[-2:])
        # A seed for each image: rows that were not kept come out the same again.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        points = query_points(
            masks.reshape(-1, *size), self.count, self.boundary, generator
        )
        rows, columns = centers(sam, size)
        height, width = sam.resized(size)
        cell = sam.side / sam.cells
        # The cell that a point falls into. If the center of that cell lies in
        # the padding, the point takes the cell before.
        y = (points[:, 1] / size[0] * height / cell).long().clamp(max=len(rows) - 1)
        x = (points[:, 0] / size[1] * width / cell).long().clamp(max=len(columns) - 1)
        # `load` does not keep the embedding in memory: the rows are kept instead, and
        # seldom anything else needs the embedding of a labeled image (refinement does,
        # with `--unlabeled-includes-labeled`).
        embedding, table = self.embeddings.load(index), []
        # In chunks: 128 prompts at 64 x 64 x 256 together would be 0.5 GB a tensor.
        for some, i, j in zip(
            points.split(CHUNK), y.split(CHUNK), x.split(CHUNK), strict=True
        ):
            # One map for each prompt, cut to the cells that lie in the image.
            maps = sam.features(embedding, some.to(sam.device), size)
            maps = maps.unflatten(1, (sam.cells, sam.cells))  # (q, cells, cells, D)
            maps = maps[:, : len(rows), : len(columns)].flatten(1, 2)  # (q, P, D)
            cells = (i * len(columns) + j).to(sam.device)
            # One row of each map: the cell of the map's own point against all others.
            table += [
                similarity(m, c[None])[0] for m, c in zip(maps, cells, strict=True)
            ]
        return y * len(columns) + x, torch.stack(table).half().cpu()


def sampled(
    features: Tensor, geometry: Geometry, rows: Tensor, columns: Tensor
) -> Tensor:
    """The student's features at some locations of the original image.

    Args:
        features: (D, H / 4, W / 4), stride 4, of one padded view.
        geometry: of the view.
        rows, columns: (R,), (K,) locations, as fractions of the original's height and
            width; those outside of the view have no meaning.

    Returns:
        (R * K, D).
    """
    # In pixels of the view, then in cells of the map, whose centers are 0, 1, 2, ...
    y, x = geometry.from_original(rows, columns)
    down = between(y.to(features) / 4 - 0.5, features.shape[1])  # (R, H / 4)
    across = between(x.to(features) / 4 - 0.5, features.shape[2])  # (K, W / 4)
    # Bilinear: the center of a SAM cell seldom falls on the center of a student's cell.
    # (`F.grid_sample` does the same, but its gradient varies from call to call on a
    # GPU.)
    return (down @ features @ across.T).flatten(1).T


def between(places: Tensor, cells: int) -> Tensor:
    """Linear interpolation, as a matrix.

    Args:
        places: (R,) on a line, in cells, whose centers are 0 to cells - 1; beyond the
            outermost centers the outermost value counts.
        cells: their number.

    Returns:
        (R, cells): how much each cell counts for each place; rows sum to 1.
    """
    centers = torch.arange(cells, device=places.device)
    distance = (places.clamp(0, cells - 1)[:, None] - centers).abs()
    return (1 - distance).clamp(min=0)


def shown(geometry: Geometry, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows and columns of locations lie in a view: bool (R,) and (K,).

    All of them without a crop. The padding of a batch begins where the view ends.
    """
    y, x = geometry.from_original(rows, columns)
    height, width = geometry.view
    return (y >= 0) & (y < height), (x >= 0) & (x < width)


def loss(features: Tensor, items: list[dict], structure: Structure) -> Tensor:
    """S4M Eq. (SD) over a labeled batch: a scalar.

    Args:
        features: (B, D, H / 4, W / 4), the student's stride-4 level, with gradient.
        items: B items of `data.Stream`.
        structure: SAM's side, without gradient.

    Returns:
        The mean over the images. One whose view shows no query point has loss 0.
    """
    total = features.new_zeros(())
    # float32, also under mixed precision: cosines are near 1, where 16 bits are coarse.
    for own, item in zip(features.float(), items, strict=True):
        # Both sides at the same locations of the original image: SAM's cells in it.
        geometry = item["geometry"]
        queries, sam_rows = structure[item["index"]]
        rows, columns = centers(structure.sam, geometry.original)
        in_rows, in_columns = shown(geometry, rows, columns)
        # Without a crop all cells are seen; else both i and j must be in it.
        seen = (in_rows[:, None] & in_columns).flatten()  # (P,)
        asked = seen[queries]
        # A crop may show none of the query points; the mean over nothing would be NaN.
        if not asked.any():
            continue
        # The cells in the view are numbered anew: by how many of them come before.
        number = (seen.cumsum(dim=0) - 1)[queries[asked]]
        cells = sampled(own, geometry, rows[in_rows], columns[in_columns])
        # The gradient flows into the features at the query and at all other locations.
        similar = similarity(cells, number.to(own.device))
        # SAM's rows are constants, cut to what the view shows.
        wanted = sam_rows[asked][:, seen]
        # S4M Eq. (SD); smooth L1 with beta 1 is the Huber loss with delta 1.
        total = total + F.smooth_l1_loss(similar, wanted.to(similar), beta=1.0)
    return total / len(items)
