r"""Loader processes: batches of a stream, and what happens when one dies.

Read next: `ssis/engine/session.py`, which asks for the batches.
"""

import contextlib
import signal

import torch

from ssis import UserError
from ssis.data import Shard, Stream


# What a worker's connection gives if it is killed while it is handing over a batch.
BROKEN = (ConnectionResetError, EOFError)


STOPS = (signal.SIGINT, signal.SIGTERM)


def signals_wait(how: str) -> None:
    """Let the signals that stop a run wait ("SIG_BLOCK"), or no longer."""
    # Windows has no process groups that are sent them.
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(getattr(signal, how), STOPS)


def ignore_signals(worker: int) -> None:
    """Ctrl-C and SIGTERM reach workers too; only the main process is to react."""
    for name in STOPS:
        signal.signal(name, signal.SIG_IGN)
    signals_wait("SIG_UNBLOCK")


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
    except (RuntimeError, UserError, *BROKEN) as error:
        first = error.__cause__ if isinstance(error, UserError) else error
        said = str(first).strip()
        # Killed while it was handing over a batch, it is met as a broken connection.
        if isinstance(error, BROKEN):
            said = f"DataLoader worker: {said or 'end of its data'}"
        elif not said.startswith("DataLoader worker (pid"):
            raise
        raise UserError(
            f"a loader worker died ({said.splitlines()[0].strip()}): often because "
            "memory ran out, then give fewer --workers; the last checkpoint is kept, "
            "and the same command resumes from it"
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


def batches(stream: Stream, shard: Shard, workers: int, pin: bool = False):
    """Batches (lists of items) of one process.

    Args:
        stream: what to draw from.
        shard: the numbers of its items, batch by batch.
        workers: loader processes; 0: none.
        pin: put them into pinned memory, from which a GPU fetches them while the host
            goes on.
    """
    loader = torch.utils.data.DataLoader(
        stream,
        batch_sampler=shard,
        num_workers=workers,
        # Images differ in size: a batch is a list.
        collate_fn=list,
        pin_memory=pin,
        # The streams carry their own seeds; the loader must not consume the global
        # ones, or the number of restarts would change the results.
        generator=torch.Generator(),
        worker_init_fn=ignore_signals,
    )
    # A worker that has just begun would end at a signal, which a cluster sends to all
    # processes: in it the signals wait until it ignores them.
    signals_wait("SIG_BLOCK")
    try:
        items = iter(loader)
    finally:
        signals_wait("SIG_UNBLOCK")
    try:
        yield from items
    except BROKEN:
        # Now, or PyTorch's handler would raise a second time while the first error is
        # on its way.
        end_workers()
        raise
