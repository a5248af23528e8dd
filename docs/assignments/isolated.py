"""Run a task's tests in a process of its own, which may hang, crash or leave when it likes.

What is loaded from the student is loaded in that process only. It has a session of its own,
so that its end, or the time limit, takes along what it started (unless that made a session
of its own); its output goes nowhere; memory and the size of files are limited. It is believed
to have passed only if it leaves a report in which every collected test passed: a student's
`os._exit(0)` leaves none. This is protection against accidents, not against malice: the
student's code runs as you, with your files and your network.

PyTorch takes seconds to load. Where there is fork (Linux) it is loaded once, before any
student's code, and each process is a copy that has it already.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

# One thread: a process with several cannot be forked safely, and these tests are small.
os.environ["OMP_NUM_THREADS"] = "1"

FORK = sys.platform == "linux"
MEMORY = 4 * 2**30  # bytes, beyond what the libraries take
FILE_SIZE = 2**30
# Those of the project and of its tests that take long to load; never `ssis` itself.
HEAVY = (
    *("torch", "torchvision.models.detection", "torchvision.transforms.v2", "numpy"),
    *("PIL.Image", "segment_anything", "pycocotools.coco", "pytest", "tqdm"),
    *("torchvision.ops", "torch.optim.swa_utils", "torch.distributed", "pycocotools.cocoeval"),
    *("matplotlib.pyplot", "concurrent.futures"),
)


@dataclass
class Result:
    """How a task's tests ended.

    Attributes:
        status: "passed", "failed", "timed out", "crashed" or "cannot be imported".
        message: why, in one line; "" if passed.
        seconds: of wall-clock time.
        failures: (test, message) of each test that failed.
    """

    status: str
    message: str
    seconds: float
    failures: list


class Recorder:
    """A pytest plugin that notes what was collected and how it ended."""

    def __init__(self):
        self.collected, self.passed, self.failures, self.broken = [], [], [], ""

    def pytest_collection_finish(self, session):
        self.collected = [item.nodeid for item in session.items]

    def pytest_collectreport(self, report):
        if report.failed:
            self.failures.append([report.nodeid, one_line(str(report.longrepr))])

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            self.passed.append(report.nodeid)
        if report.failed or report.skipped:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = crash.message if crash else str(report.longrepr)
            self.failures.append([report.nodeid, one_line(said)])


def one_line(text: str) -> str:
    """The beginning of a message, without its line breaks."""
    words = " ".join(text.split())
    return words if len(words) <= 200 else words[:199] + "…"


def work(tree: str, module: str, tests: list[str], report: str, seed: int, first: bool) -> None:
    """The process's part: import the module, run the tests, write the report, end."""
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
        with contextlib.suppress(OSError):  # only Linux says how much it has now
            now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    os.chdir(tree)
    os.environ.update(SSIS_SEED=str(seed), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    sys.dont_write_bytecode = True
    sys.path.insert(0, tree)
    recorder = Recorder()
    try:
        importlib.import_module(module.removesuffix(".py").replace("/", "."))
    except BaseException as error:
        recorder.broken = one_line(f"{type(error).__name__}: {error}")
    else:
        import pytest

        # The project's own options ask for a plugin that is not loaded here.
        options = ["--capture=no", "-p", "no:cacheprovider", "-o", "addopts=", "--tb=short"]
        options += ["-x"] if first else []
        pytest.main([*options, "--rootdir", tree, *tests], plugins=[recorder])
    Path(report + ".tmp").write_text(json.dumps(vars(recorder)))
    os.replace(report + ".tmp", report)
    os._exit(0)


def warm() -> None:
    """Load what every process needs, once."""
    if FORK and "torch" not in sys.modules:
        for name in HEAVY:
            importlib.import_module(name)
        # What is loaded now is never garbage: pytest's collections need not walk through it,
        # which took two thirds of a process's time.
        gc.freeze()
        atexit.register(gc.unfreeze)


def start(arguments: list) -> int | subprocess.Popen:
    """A process at `work`, in a session of its own."""
    if not FORK:
        command = [sys.executable, __file__, json.dumps(arguments)]
        return subprocess.Popen(command, start_new_session=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            work(*arguments)
        finally:  # whatever happens, this copy of the grader ends here
            os._exit(1)
    return pid


def finish(process, timeout: float) -> tuple[bool, int]:
    """Wait, then end all that it started: (whether it ended in time, its exit status)."""
    deadline, ended = time.monotonic() + timeout, False
    pid = process if FORK else process.pid
    try:
        while not ended and time.monotonic() < deadline:
            if FORK:  # look at it, but leave its id to it, so that no other process has it
                ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            else:
                ended = process.poll() is not None
            time.sleep(0 if ended else 0.005)
    finally:  # also when the grader itself is interrupted
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        # In case it has not come to a session of its own yet.
        if not ended:
            if FORK:
                os.kill(pid, signal.SIGKILL)
            else:
                process.kill()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if FORK else process.wait()
    return ended, status


def run(
    tree: Path, module: str, tests, timeout: float, seed: int = 0, first: bool = True
) -> Result:
    """Run tests in a tree.

    Args:
        tree: a copy of the project, with the module to be tested in its place.
        module: "ssis/filters.py"; it is imported first, since a module that cannot be is
            another thing than a test that fails.
        tests: node ids.
        timeout: seconds.
        seed: of what the tests draw (SSIS_SEED).
        first: stop at the first failure.
    """
    # Before the clock runs: loading PyTorch is not the first task's time.
    warm()
    with tempfile.TemporaryDirectory(prefix="ssis-report-") as folder:
        report, begun = Path(folder) / "report.json", time.monotonic()
        process = start([str(tree), module, list(tests), str(report), seed, first])
        ended, status = finish(process, timeout)
        seconds = time.monotonic() - begun
        if not ended:
            return Result("timed out", f"not ended after {timeout:g} seconds", seconds, [])
        try:
            told = json.loads(report.read_text())
        except (OSError, ValueError):
            how = f"exit status {status}"
            with contextlib.suppress(ValueError):
                how = signal.Signals(-status).name
            return Result("crashed", f"the process ended before its tests ({how})", seconds, [])
    return judge(told, tests, seconds)


def judge(told: dict, tests, seconds: float) -> Result:
    """Passed only if exactly the expected tests did, and all of them."""
    if told["broken"]:
        return Result("cannot be imported", told["broken"], seconds, [])
    failures = [(name.split("::")[-1], said) for name, said in told["failures"]]
    if failures:
        return Result("failed", ": ".join(failures[0]), seconds, failures)
    present = {name.split("[")[0] for name in told["collected"]}
    if set(tests) != present or sorted(told["passed"]) != sorted(told["collected"]):
        return Result("failed", "not all of the tests were run to their end", seconds, [])
    return Result("passed", "", seconds, [])


if __name__ == "__main__":
    work(*json.loads(sys.argv[1]))
