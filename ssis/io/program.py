r"""What a command prints when it cannot go on: one line, and exit status 2.

A traceback is for mistakes of the code. A mistake of the user, a full memory or Ctrl-C
is one line that says what happened, where, and what to do.

Read next: `ssis/io/files.py`, why nothing is lost then.
"""

import os
import sys

import torch.distributed as dist

from ssis import UserError

# Of all programs: training has these flags, the others have --device.
SMALLER = (
    "train with smaller batches (--pretrain-batch, --labeled-batch, "
    "--unlabeled-batch) or smaller views (--short-side, --long-side, --crop-height, "
    "--crop-width)"
)
NO_MEMORY = (
    f"the GPU's memory is full; {SMALLER}, or with --amp (the last checkpoint is "
    "kept); evaluate and predict with --device cpu"
)
# What PyTorch says where it is not its code that is wrong, and what we say.
KNOWN = {
    "out of memory": NO_MEMORY,
    "STATUS_ALLOC_FAILED": NO_MEMORY,
    "can't allocate memory": f"the computer's memory is full; {SMALLER} (the last "
    "checkpoint is kept)",
    "does not have a deterministic implementation": "--deterministic: this GPU "
    "computes one of the operations in a varying way only ({}); leave the flag out",
}


def run(command, argv: list[str] | None) -> None:
    """Run a command; a mistake of the user is one line and status 2, no traceback.

    Ctrl-C is one line too, and status 130. While a training run makes steps, it handles
    Ctrl-C itself (`ssis/engine/signals.py`).

    Args:
        command: called with `argv`.
        argv: arguments; None: those of the command line.
    """
    try:
        command(argv)
    except UserError as error:
        give_up(error)
    except RuntimeError as error:
        for sign, line in KNOWN.items():
            if sign in str(error):
                give_up(UserError(line.format(str(error).split(" ")[0])))
        raise
    except KeyboardInterrupt:
        said = "stopped; what was saved stays, the same command goes on"
        print(said, file=sys.stderr)
        sys.exit(130)


def give_up(error: UserError) -> None:
    """Print one line and end this process with status 2.

    Args:
        error: with an empty message nothing is printed; another process has done it.
    """
    # An error raised in a loader worker arrives with the worker's traceback around it,
    # whose last line is the message.
    if str(error):
        line = str(error).strip().splitlines()[-1].removeprefix("ssis.UserError: ")
        # It may quote a value of any length.
        if len(line) > 1000:
            line = f"{line[:600]} … {line[-300:]}"
        print(f"error: {line}", file=sys.stderr, flush=True)
    # With several processes not `sys.exit`: it would leave the process group in order,
    # and so wait for the others, which may be waiting for this one. torchrun ends them.
    if dist.is_initialized():
        os._exit(2)
    sys.exit(2)
