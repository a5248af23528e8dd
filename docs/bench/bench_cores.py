r"""Time of a step on cores that are idle, and on cores that another program uses as well.

    python docs/bench/bench_cores.py [--rounds 1] [--neighbors 0 1] [--ways one two] [--steps 50]

Runs `train.py` with the default settings for a few steps and reads off its metrics when they were
made; no other program should run. Each way beside so many neighbors, processes that count without
end:

    usual     one process, as the libraries do by themselves: threads that wait spin for a while
    short     one process, threads spin a thirtieth of that (GOMP_SPINCOUNT=10000)
    sleep     one process, threads do not spin (OMP_WAIT_POLICY=PASSIVE)
    one       one process of one thread (OMP_NUM_THREADS=1)
    two       two processes of one thread each (torchrun --nproc_per_node 2)
    huge      the same, tensors in huge pages (THP_MEM_ALLOC_ENABLE=1, PyTorch's)
    keep      the same, glibc keeps what is freed (MALLOC_TRIM_THRESHOLD_ and others)
    both      the same, huge and keep

For each the seconds of a supervised step and of a step of `full`, both relative to the first
row, and the memory of all its processes at their peaks (Linux alone). After so few steps the
teacher is sure of nothing: no pseudo-label is kept, so this is the cheapest step of `full`.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ssis.datasets import shapes  # noqa: E402

DATA = ROOT / "data" / "shapes"
TWO = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
HUGE = dict(THP_MEM_ALLOC_ENABLE="1")
KEEP = dict(
    MALLOC_TRIM_THRESHOLD_="2000000000", MALLOC_MMAP_THRESHOLD_="1000000000",
    MALLOC_TOP_PAD_="100000000",
)  # fmt: skip
WAYS = dict(
    usual=([], {}),
    short=([], dict(GOMP_SPINCOUNT="10000")),
    sleep=([], dict(OMP_WAIT_POLICY="PASSIVE")),
    one=([], dict(OMP_NUM_THREADS="1")),
    two=(TWO, dict(OMP_NUM_THREADS="1")),
    huge=(TWO, dict(OMP_NUM_THREADS="1", **HUGE)),
    keep=(TWO, dict(OMP_NUM_THREADS="1", **KEEP)),
    both=(TWO, dict(OMP_NUM_THREADS="1", **HUGE, **KEEP)),
)


def peak(pid: int) -> float:
    """GiB of a process and all that it has started, each at its peak; 0 but on Linux."""
    total = 0.0
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            total += float(line.split()[1]) / 2**20 if line.startswith("VmHWM") else 0
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(map(peak, map(int, (task / "children").read_text().split())))
    return total


def measure(way: str, folder: Path, steps: int) -> list[float]:
    """Seconds a step of both stages, and GiB."""
    launcher, variables = WAYS[way]
    flags = f"--pretrain-steps {steps} --burnin-steps 0 --mutual-steps {steps}".split()
    flags += ["--eval-every", "1000", "--audit-images", "8", "--output", str(folder / "run")]
    # The first teacher is evaluated in between: on a few images.
    shapes.make(DATA)
    few = json.loads((DATA / "instances_val.json").read_text())
    few["images"] = few["images"][:8]
    ids = {image["id"] for image in few["images"]}
    few["annotations"] = [a for a in few["annotations"] if a["image_id"] in ids]
    (folder / "few.json").write_text(json.dumps(few))
    for part in ("train", "val", "test"):
        path = DATA / "instances_train.json" if part == "train" else folder / "few.json"
        images = DATA / ("train" if part == "train" else "val")
        flags += [f"--{part}-json", str(path), f"--{part}-images", str(images)]
    run = subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "train.py"), *flags],
        env={**os.environ, **variables}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    seen, path = {}, folder / "run" / "metrics.jsonl"
    while 2 * steps not in seen:
        if run.poll():
            raise SystemExit(run.stderr.read().decode()[-2000:])
        with contextlib.suppress(OSError, ValueError):
            for line in path.read_text().splitlines():
                seen.setdefault(json.loads(line)["step"], time.perf_counter())
        time.sleep(0.02)
    memory = peak(run.pid)
    run.terminate()
    run.wait()
    # Steps are written in tens: the first ten of a stage warm up.
    return [
        (seen[end] - seen[begin]) / (end - begin)
        for begin, end in ((10, steps), (steps + 10, 2 * steps))
    ] + [memory]


def main() -> None:
    """One table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--neighbors", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--ways", nargs="+", default=[*WAYS], choices=WAYS)
    parser.add_argument("--steps", type=int, default=50, help="of each stage, in tens")
    args = parser.parse_args()
    first = None
    print(f"{os.cpu_count()} cores")
    print("| | neighbors | supervised | full | relative | GiB |\n" + "|---" * 6 + "|")
    for count in args.neighbors:
        for way in args.ways:
            busy = [
                subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)
            ]
            try:
                found = []
                for _ in range(args.rounds):
                    with tempfile.TemporaryDirectory() as name:
                        found.append(measure(way, Path(name), args.steps))
            finally:
                for process in busy:
                    process.kill()
            best = [min(times) for times in zip(*found, strict=True)]
            first = first or best
            relative = ", ".join(f"{a / b:.2f}" for a, b in zip(best[:2], first[:2], strict=True))
            times = f"{best[0]:.3f} s | {best[1]:.3f} s"
            print(f"| {way} | {count} | {times} | {relative} | {best[2]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
