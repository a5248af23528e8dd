r"""When numbers go wrong: a step that is not finite is skipped; three end the run.

One NaN in a gradient makes every weight NaN, one step later every prediction, and with
the next EMA update the teacher. A single such step happens (a mask of one pixel in
bf16, a box of 10^-9 pixels) and is no reason to end a run; after three in a row the run
has diverged. With fp16 the loss scaler skips steps as a matter of course, until its
scale fits; only a loss that is itself not finite counts there.

What a skipped step leaves behind: nothing in the weights, the optimizer or BatchNorm's
statistics; `skipped` in `metrics.jsonl`. What the third leaves: `nonfinite_0.pt` (one
for each process with a suspect batch) with the batch, the loss table and the weights.

Read next: `ssis/engine/signals.py`, the other way in which a run can end early.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from ssis import UserError, distributed, losses

# So many steps in a row end the run.
LIMIT = 3


class Guard:
    """Watches the gradients of a run.

    Args:
        net: the student, without DDP's wrapper.
        files: names of the training images, by index.
        folder: the run's.
        scaled: whether a loss scaler is at work (fp16).
        rank: of this process.
    """

    def __init__(
        self, net: nn.Module, files: list[str], folder: Path, scaled: bool, rank: int
    ):
        self.net, self.files, self.folder = net, files, folder
        self.scaled, self.rank, self.in_a_row = scaled, rank, 0
        # Not those of frozen norms, which are constants.
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        self.buffers = [buffer for norm in norms for buffer in norm.buffers()]
        self.statistics: list[Tensor] = []

    def begin(self) -> None:
        """Remember BatchNorm's statistics: a pass over NaN spoils them for good."""
        self.statistics = [buffer.clone() for buffer in self.buffers]

    def allows(
        self, norm: Tensor, row: dict[str, Tensor], items: list, step: int
    ) -> bool:
        """Whether the step may be taken; every process must call this, and all agree.

        Args:
            norm: of the gradients, summed over the processes: the same on all of them.
            row: of the loss table; that of a step that is skipped is set to nothing.
            items: of the batch, as the streams gave them.
            step: its number.

        Raises:
            UserError: it is the third in a row that may not.
        """
        # All in one tensor: a GPU is waited for once.
        values = torch.stack([norm, *(value.sum() for value in row.values())])
        finite, *good = values.isfinite().tolist()
        bad = [name for name, each in zip(row, good, strict=True) if not each]
        if not finite and self.scaled:
            finite = not distributed.all_sum(norm.new_tensor(len(bad))).item()
        row["skipped"] = losses.entry(not finite, 1, norm.device)
        if finite:
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        names = [self.files[item["index"]] for item in items]
        mine, everywhere = bad, distributed.gather((bad, names))
        # All batches, when every loss is finite and only the gradient is not.
        bad = sorted({name for part, _ in everywhere for name in part})
        if self.in_a_row == LIMIT and (mine or not bad):
            self.dump(step, row, items, names)
        suspects = [n for part, names in everywhere if part or not bad for n in names]
        words = (
            f"step {step}: {', '.join(bad) or 'the gradient'} is not finite (images "
            f"{', '.join(suspects[:8])}{' …' if len(suspects) > 8 else ''})"
        )
        if self.in_a_row == LIMIT:
            raise UserError(
                f"{words}, the third step in a row; the batch is in "
                f"{self.folder}/nonfinite_*.pt, the last checkpoint is kept; try a "
                "lower --lr or --clip-norm, --amp off, or go without those images"
                if self.rank == 0
                else ""
            )
        if self.rank == 0:
            print(f"warning: {words}; the step is skipped", file=sys.stderr)
        for buffer, before in zip(self.buffers, self.statistics, strict=True):
            buffer.copy_(before)
        for name in row.keys() - {"skipped"}:
            row[name] = torch.zeros_like(row[name])
        return False

    def dump(self, step: int, row: dict, items: list, names: list[str]) -> None:
        """Write all that is needed to see what happened, if it can be written."""
        state = dict(
            step=step,
            table={name: value.tolist() for name, value in row.items()},
            images=names,
            batch=[
                {k: v for k, v in item.items() if k in ("image", "target")}
                for item in items
            ],
            student=self.net.state_dict(),
        )
        try:
            torch.save(state, self.folder / f"nonfinite_{self.rank}.pt")
        except (OSError, RuntimeError) as error:
            print(f"warning: no dump could be written ({error})", file=sys.stderr)
