r"""From images on disk to batches: the parts of a dataset, the streams, the shares.

*The stream of batches is a pure function of the seed and the step.* Item k of a stream
knows its image and the seed of its augmentation. So resuming needs only the number of
the step, and neither the number of loader workers nor that of processes changes what
is trained on.

*Only two of the three streams know any truth.* That of the unlabelled images does not
read their annotations at all, so nothing can leak.

Read next: `ssis/augment.py`, the views of an image.
"""

import contextlib
import hashlib
import os
import signal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ssis import UserError, augment, shapes, signs
from ssis.coco_json import add_folder, load_coco
from ssis.data import Dataset, sanitize


def part_paths(config, part: str) -> tuple[str, str]:
    """JSON and image folder of "train", "val" or "test".

    A flag says so (`--train-json`), or the preset's folder `data` holds
    `instances_<part>.json` beside `<part>/`. Without test part it is the validation
    part.
    """
    source, folder = getattr(config, f"{part}_json"), getattr(config, f"{part}_images")
    if bool(source) != bool(folder):
        raise UserError(
            f"--{part}-json and --{part}-images go together: give both, or neither"
        )
    if not source and config.data and (part != "test" or not config.val_json):
        source, folder = f"{config.data}/instances_{part}.json", f"{config.data}/{part}"
    if part == "test" and not os.path.exists(source):
        if source and source == config.test_json:
            raise UserError(f"{source}: COCO JSON not found")
        return part_paths(config, "val")
    if not source:
        raise UserError(
            f"--{part}-json J --{part}-images D: needed with --preset {config.preset}"
        )
    return source, folder


def prepare(config) -> None:
    """Once, before all else: draw a built-in dataset, check every image file."""
    drawn = {"shapes": shapes.SHAPES, "signs": signs.SIGNS}
    if config.preset in drawn and not config.train_json:
        shapes.make(Path(config.data), scenes=drawn[config.preset])
    for part in open_parts(config):
        part.check_files()


def open_parts(config) -> tuple[Dataset, Dataset, Dataset]:
    """Training, validation and test datasets, with the training set's classes."""
    train_set = load_coco(*part_paths(config, "train"))
    val, test = (
        load_coco(*part_paths(config, part), train_set.names)
        for part in ("val", "test")
    )
    if config.unlabeled_images:
        add_folder(train_set, config.unlabeled_images, apart=(val, test))
    return train_set, val, test


class Stream(torch.utils.data.Dataset):
    """An endless shuffled sequence of views; item k is the same in every run.

    Item k is image `perm_e[k mod n]` in epoch `e = k div n`, with a permutation and an
    augmentation that depend on (seed, k) alone.

    Args:
        dataset: where the images are.
        indices: which of them take part; at least one.
        config: for the views' sizes.
        seed: of this stream; labelled and unlabelled streams have different ones.
        with_target: False hides the annotations, as semi-supervised learning demands.
    """

    def __init__(
        self, dataset: Dataset, indices: list[int], config, seed: int, with_target: bool
    ):
        self.dataset, self.indices = dataset, np.array(indices, np.int64)
        self.config, self.seed, self.with_target = config, seed, with_target
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def __getitem__(self, k: int) -> dict:
        """A weak view: image (3, h, w) in [0, 1], index, seed, geometry, any target."""
        epoch, place = divmod(k, len(self.indices))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
            order = torch.randperm(len(self.indices), generator=generator).numpy()
            self._epoch, self._order = epoch, order
        index = int(self.indices[self._order[place]])
        target = self.dataset.target(index) if self.with_target else None
        seed = _mix(self.seed, ~k)
        image, target, geometry = augment.weak_view(
            self.dataset.image(index), target, self.config, seed
        )
        item = dict(image=image, index=index, seed=seed, geometry=geometry)
        return item if target is None else dict(item, target=sanitize(target))


def _mix(seed: int, number: int) -> int:
    """One 63-bit seed from two numbers, unrelated for neighbouring numbers."""
    digest = hashlib.blake2b(f"{seed},{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def ignore_signals(worker: int) -> None:
    """Ctrl-C and SIGTERM reach workers too; only the main process is to react."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)


class Streams(NamedTuple):
    """The three streams of a run. Only `labeled` and `audit` know any truth."""

    labeled: Stream
    unlabeled: Stream
    audit: Stream | None


def streams(
    train_set: Dataset, labeled: list[int], unlabeled: list[int], config
) -> Streams:
    """The streams of a run, each with a seed of its own.

    The audit's is over those unlabelled images whose truth is known; None without any.
    """
    hidden = set(unlabeled) - set(labeled)
    if config.oracle != "none" and max(unlabeled, default=0) >= train_set.annotated:
        raise UserError(
            f"--oracle {config.oracle}: needs the truth of every unlabelled image, and "
            "--unlabeled-images has none; leave one of the two out"
        )
    audited = [i for i in sorted(hidden) if i < train_set.annotated]
    return Streams(
        Stream(train_set, labeled, config, config.seed * 3, True),
        # The one exception: an oracle is told the truth, and says so.
        Stream(
            train_set, unlabeled, config, config.seed * 3 + 1, config.oracle != "none"
        ),
        Stream(train_set, audited, config, config.seed * 3 + 2, True)
        if audited
        else None,
    )


class Shard(torch.utils.data.Sampler):
    """Positions of one process: its part of each global batch, from a step on.

    The global batch of step s is items s * B to (s + 1) * B of the stream, whatever the
    number of processes; process r of n takes the r-th n-th of it.
    """

    def __init__(self, batch: int, start: int, stop: int, rank: int, world: int):
        self.batch, self.start, self.stop = batch, start, stop
        self.rank, self.share = rank, batch // world

    def __iter__(self):
        for step in range(self.start, self.stop):
            begin = step * self.batch + self.rank * self.share
            yield list(range(begin, begin + self.share))

    def __len__(self) -> int:
        return max(0, self.stop - self.start)


@contextlib.contextmanager
def dead_workers():
    """Within it, a loader worker that dies is one line; after it, no worker is left.

    PyTorch raises its RuntimeError from a signal handler, so in any line of the main
    process (also in one that makes a UserError of a RuntimeError, as the writing of a
    checkpoint does), or from the queue, whichever is first. An error *in* a worker is
    another thing ("Caught ... in DataLoader worker process 0"), and passes.

    Raises:
        UserError: a worker was killed, or died in some other way.
    """
    try:
        yield
    except (RuntimeError, UserError) as error:
        first = error.__cause__ if isinstance(error, UserError) else error
        said = str(first).strip()
        if not said.startswith("DataLoader worker (pid"):
            raise
        raise UserError(
            f"a loader worker died ({said.splitlines()[0].strip()}): often for "
            "want of memory, then give fewer --workers; the last checkpoint is kept, "
            "the same command goes on from it"
        ) from error
    finally:
        end_workers()


def end_workers() -> None:
    """Kill what loader workers are left.

    When a program ends, Python sends its daemons SIGTERM and waits for them; workers
    ignore that signal, so after an error it would wait for ever.
    """
    # PyTorch's own handler would take their end for an accident. (Windows has none.)
    child_ended = getattr(signal, "SIGCHLD", None)
    before = child_ended and signal.signal(child_ended, signal.SIG_DFL)
    for worker in torch.multiprocessing.active_children():
        worker.kill()
        worker.join()
    if child_ended:
        signal.signal(child_ended, before or signal.SIG_DFL)


def batches(stream: Stream, batch: int, start: int, run):
    """Batches (lists of items) from a step on to the end, for one process.

    Args:
        stream: what to draw from.
        batch: size of the global batch.
        start: the first step.
        run: `run.Run`.

    Raises:
        UserError: the batch cannot be shared out equally.
    """
    if batch % run.world:
        raise UserError(
            f"a batch of {batch} images cannot be shared by {run.world} processes; "
            "choose --labeled-batch and --unlabeled-batch accordingly"
        )
    shard = Shard(batch, start, run.config.stage_ends[-1], run.rank, run.world)
    return iter(
        torch.utils.data.DataLoader(
            stream,
            batch_sampler=shard,
            num_workers=run.config.workers,
            # Images differ in size: a batch is a list.
            collate_fn=list,
            # The streams carry their own seeds; the loader must not consume the global
            # ones, or the number of restarts would change the results.
            generator=torch.Generator(),
            worker_init_fn=ignore_signals,
        )
    )
