r"""One command line: `python -m ssis COMMAND`; without a command, the list of them.

Training and evaluation are programs of their own, `train.py` and `evaluate.py`.

Read next: `ssis/tools/predict.py`, the first of the commands.
"""

import importlib
import sys

from ssis import UserError

# Command -> its module, and what it does, in a line.
COMMANDS = {
    "predict": ("tools.predict", "find instances in images with a trained model"),
    "report": ("report.page", "write a run's page, also while it trains"),
    "export": ("tools.export", "a trained model as plain torchvision, and as ONNX"),
    "prepare": ("tools.prepare", "make COCO, Cityscapes, VOC or your data ready"),
    "shapes": ("datasets.shapes", "draw another built-in dataset"),
    "sam": ("tools.train_tiny_sam", "train another tiny SAM"),
    "sam encode": ("tools.encode", "fill the cache of SAM's embeddings ahead"),
    "study own": ("tools.label_curve", "the label curve of your own data"),
    "study": ("tools.study", "make the runs of a table in docs/results.md"),
}


def overview() -> str:
    """The commands, a line each."""
    lines = [f"  {name:<10} {words}" for name, (_, words) in COMMANDS.items()]
    head = "usage: python -m ssis COMMAND ...     (COMMAND --help says more)\n\n"
    tail = (
        "\n\nTraining: python train.py --help. Evaluation: python evaluate.py --help."
    )
    return head + "\n".join(lines) + tail


def main(argv: list[str]) -> None:
    """Run the command that `argv` begins with."""
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return
    # The longer name first.
    for words in (2, 1):
        if (name := " ".join(argv[:words])) in COMMANDS:
            # Imported only now: the list needs no torch, nor do the processes that
            # `prepare` starts, which import this file again.
            module = importlib.import_module(f"ssis.{COMMANDS[name][0]}")
            module.main(argv[words:])
            break
    else:
        from ssis.io import program

        names = ", ".join(COMMANDS)
        program.give_up(UserError(f"no command {argv[0]!r}; there is {names}"))


if __name__ == "__main__":
    main(sys.argv[1:])
