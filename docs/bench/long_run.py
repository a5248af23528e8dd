"""Does a long run stay as it began? Memory and time of train.py over many steps.

    python docs/bench/long_run.py --steps 20000

Starts train.py (both papers, the built-in dataset, batches of two labeled images and one
unlabeled, two loader workers a stream), looks at its processes every few seconds, and prints a
table: for each tenth of mutual learning the memory of the main process and of its workers, and
the time of a step. Everything is written into `docs/results/long-run.json`. Linux only: it
reads /proc.

Memory is the proportional share (`Pss`): a page that five processes share counts a fifth for
each. What is compared is the median of a tenth, which a leak raises as well; the peak, in an
evaluation, is seen or missed by a look every ten seconds. Time is given twice: by the clock,
which other work on the machine slows down, and of the CPU. In each tenth there is one evaluation.

A step costs more with more pseudo-labels, and a teacher that learns keeps more and more of them.
So that the load stays the same for all steps, this one hardly moves (`--ema-decay 0.99999`).
And SAM's embeddings, which fill 50 MB as image after image gets a pseudo-label, are not kept
in memory (`--sam-memory-gb 0`): what is looked for is growth that is not meant.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
# With batches this small it takes a fifth of the labels and 4,000 steps to make a teacher that
# is sure of something. One that is not leaves nothing to do for refinement and copy-paste.
PRETRAIN, BURNIN = 4000, 50
FLAGS = (
    f"--labeled 20% --labeled-batch 2 --unlabeled-batch 2 --pretrain-steps {PRETRAIN} "
    f"--burnin-steps {BURNIN} --workers 2 --checkpoint-every 500 --audit-images 40 "
    "--ema-decay 0.99999 --sam-memory-gb 0"
)
PARTS = 10


def memory(pid: int) -> float:
    """MB of memory of a process, what it shares with others by parts."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    (line,) = [line for line in rollup if line.startswith("Pss:")]
    return int(line.split()[1]) / 1000


def cpu_seconds(pid: int) -> float:
    """Seconds that all threads of a process have computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def look(pid: int, folder: Path, began: float) -> dict | None:
    """One sample of a running train.py, once it is in its last stage."""
    lines = (folder / "metrics.jsonl").read_text().splitlines() if folder.exists() else []
    rows = [json.loads(line) for line in lines[-3:]]
    rows = [row for row in rows if row.get("stage") == "mutual"]
    if not rows:
        return None
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return dict(
        step=rows[-1]["step"],
        pseudo_per_image=rows[-1]["pseudo_per_image"],
        seconds=time.monotonic() - began,
        cpu_seconds=cpu_seconds(pid),
        main_mb=memory(pid),
        workers_mb=[memory(int(child)) for child in children],
        files=sorted(p.name for p in folder.iterdir()),
        folder_mb=sum(p.stat().st_size for p in folder.iterdir()) / 1e6,
    )


def table(samples: list[dict]) -> str:
    """A line for each tenth of the steps, and how far the last is from the second.

    The first tenth is left out of that: caches fill, the allocator settles.
    """
    first, last = samples[0]["step"], samples[-1]["step"]
    lines = [
        "tenth   to step  main MB   (peak)  workers MB   ms a step  CPU ms a step   files   pseudo"
    ]
    kept = []
    for part in range(PARTS):
        low, high = (first + (last - first) * (part + k) / PARTS for k in (0, 1))
        here = [s for s in samples if low <= s["step"] <= high]
        if len(here) < 2:
            continue
        steps = here[-1]["step"] - here[0]["step"]
        took, computed = (
            1000 * (here[-1][k] - here[0][k]) / steps for k in ("seconds", "cpu_seconds")
        )
        main = median(s["main_mb"] for s in here)
        workers = median(sum(s["workers_mb"]) for s in here)
        kept.append((main, workers, took, computed))
        lines.append(
            f"{part + 1:5d} {here[-1]['step']:9d} {main:9.0f} "
            f"{max(s['main_mb'] for s in here):8.0f} {workers:12.0f} {took:11.1f} "
            f"{computed:15.1f} {len(here[-1]['files']):7d} "
            f"{sum(s['pseudo_per_image'] for s in here) / len(here):8.2f}"
        )
    change = [f"{100 * (b / a - 1):+.1f} %" for a, b in zip(kept[1], kept[-1], strict=True)]
    names = ("main", "workers", "time", "CPU time")
    pairs = ", ".join(f"{name} {value}" for name, value in zip(names, change, strict=True))
    return "\n".join([*lines, f"the last tenth against the second: {pairs}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--every", type=float, default=10, help="seconds between two looks")
    parser.add_argument("--folder", type=Path, default=Path("runs/long"))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "long-run.json")
    given = parser.parse_args()
    before = PRETRAIN + BURNIN
    if given.steps < before + 500:
        parser.error(f"--steps {given.steps}: at least {before + 500}, for {before} come before")
    mutual = given.steps - before
    flags = [*FLAGS.split(), "--mutual-steps", str(mutual), "--eval-every", str(mutual // PARTS)]
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--output", str(given.folder)]
    command += ["--resume", "never"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    samples, began = [], time.monotonic()
    while process.poll() is None:
        time.sleep(given.every)
        try:
            sample = look(process.pid, given.folder, began)
        except (OSError, ValueError):  # it has just ended, or a line is half written
            continue
        if sample and (not samples or sample["step"] > samples[-1]["step"]):
            samples.append(sample)
            given.out.write_text(json.dumps(dict(flags=flags, samples=samples)) + "\n")
    if process.returncode or not samples:
        sys.exit(f"error: train.py ended with status {process.returncode}")
    print(table(samples))


if __name__ == "__main__":
    main()
