"""Plant each bug in a copy of the checkout, run its tests there, and count which were seen."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue
from threading import Lock

from .bugs import Bug
from .draw import PRODUCT
from .reach import CHILDREN, SITECUSTOMIZE, Reach, read, statement_lines

CAUGHT, SURVIVED, EQUIVALENT, UNTESTED = "caught", "survived", "equivalent", "untested"
#: seconds that a bug's test may take beyond five times its own; one that makes it hang is seen
PATIENCE = 60.0
_FAILED = (
    1,
    2,
    3,
    4,
)  # exit codes of pytest: failures, interrupted, internal, usage (a module that cannot be imported)


@dataclass(frozen=True)
class Outcome:
    """What became of one bug."""

    area: str
    file: str
    what: str
    change: str
    drawn: bool
    verdict: str
    seconds: float = 0.0
    by: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """The same bug, also after other lines of the file have moved."""
        return self.file, self.what, self.change


class Copy:
    """A copy of a checkout's files, tracked or not ignored, in which bugs are planted one after the other."""

    def __init__(self, root: Path, place: Path) -> None:
        self.root = place
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=root,
            check=True,
            capture_output=True,
        )
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (root / name).is_file():
                target = place / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, target)

    @contextmanager
    def with_bug(self, bug: Bug) -> Iterator[None]:
        path = self.root / bug.file
        whole = path.read_bytes()
        path.write_bytes(bug.apply(whole))
        try:
            yield
        finally:
            path.write_bytes(whole)

    def trace(self, test: str, seconds: float) -> tuple[int | None, str, Reach]:
        """The same of one test without a bug, and what it runs."""
        with tempfile.TemporaryDirectory(prefix="reach-", dir=self.root.parent) as name:
            place = Path(name)
            (place / "children").mkdir()
            (place / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
            data = place / "lines"
            tracer = ["-m", "coverage", "run", f"--data-file={data}", f"--source={','.join(self._product())}"]
            more = {"PYTHONPATH": f"{place}{os.pathsep}{self.root}", CHILDREN: str(place / "children")}
            code, said = self.test([test], seconds, tracer, more)
            return code, said, read(data, self.root, place / "children")

    def _product(self) -> list[str]:
        return [str(self.root / folder) for folder in PRODUCT if (self.root / folder).is_dir()]

    def test(
        self, tests: Sequence[str], seconds: float, tracer: Sequence[str] = (), more: Mapping[str, str] | None = None
    ) -> tuple[int | None, str]:
        """Exit code of pytest, None after ``seconds``; and what it said."""
        # Without bytecode files: a changed source of the same size and second would not be read again.
        environment = {**os.environ, "PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment.pop("CI", None)
        environment |= more or {}
        place = self.root.parent / f"{self.root.name}.files"
        words = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", "--show-capture=no"]
        words += ["-m", "not gpu and not full", "--no-header", f"--basetemp={place}", *tests]
        process = subprocess.Popen(
            [sys.executable, *tracer, *words],
            cwd=self.root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=seconds)
            return process.returncode, said
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            _end_group(process)
            shutil.rmtree(place, ignore_errors=True)


def _end_group(process: subprocess.Popen[str]) -> None:
    """Ranks that a bug has left behind, too."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Campaign:
    """All bugs of one call.

    Args:
        jobs: copies, and so bugs at a time.
        equivalent: (file, change) -> why it is none.
        results: a file of JSON lines that grows; what it already says is not run again.
        slowest: seconds that a test may take without a bug.
    """

    def __init__(
        self,
        root: Path,
        *,
        jobs: int = 2,
        equivalent: dict[tuple[str, str], str] | None = None,
        results: Path | None = None,
        slowest: float = 600.0,
        say: Callable[[str], object] = print,
    ) -> None:
        self.root, self._jobs, self._slowest, self._say = root, jobs, slowest, say
        self._equivalent = equivalent or {}
        self._results = results
        self._known: dict[tuple[str, str, str], Outcome] = {}
        self._healthy: dict[str, tuple[float, Reach]] = {}
        self._locks: dict[str, Lock] = {}
        self._lock = Lock()
        if results is not None and results.exists():
            rows = [Outcome(**json.loads(line)) for line in results.read_text(encoding="utf-8").splitlines()]
            self._known = {row.key: row for row in rows}

    def run(self, bugs: Sequence[Bug]) -> list[Outcome]:
        """Outcomes in the order of ``bugs``.

        Raises:
            RuntimeError: tests fail without any bug.
        """
        left = [bug for bug in bugs if self._known_of(bug) is None]
        with tempfile.TemporaryDirectory(prefix="mutants-") as place:
            copies: Queue[Copy] = Queue()
            for number in range(min(self._jobs, len(left))):
                copies.put(Copy(self.root, Path(place) / str(number)))

            def one(bug: Bug) -> Outcome:
                copy = copies.get()
                try:
                    return self._keep(self._try(bug, copy))
                finally:
                    copies.put(copy)

            with ThreadPoolExecutor(self._jobs) as pool:
                tries = [pool.submit(one, bug) for bug in left]
                try:
                    found = {bug: future.result() for bug, future in zip(left, tries, strict=True)}
                finally:
                    pool.shutdown(cancel_futures=True)
        return [self._known_of(bug) or found[bug] for bug in bugs]

    def _known_of(self, bug: Bug) -> Outcome | None:
        """What is known before any test has run."""
        same = (bug.file, bug.context(self.root)) in self._equivalent
        if same or not bug.tests:
            return self._outcome(bug, EQUIVALENT if same else UNTESTED)
        return self._known.get(self._outcome(bug, "").key)

    def _without_a_bug(self, test: str, copy: Copy) -> tuple[float, Reach]:
        """What a test takes, and runs, as found before its first use; it must pass."""
        with self._lock:
            mine = self._locks.setdefault(test, Lock())
        with mine:
            if test not in self._healthy:
                began = time.monotonic()
                code, said, reach = copy.trace(test, self._slowest)
                if code != 0:
                    raise RuntimeError(f"{test} does not pass without a bug (pytest: {code})\n{said[-2000:]}")
                self._healthy[test] = time.monotonic() - began, reach
            return self._healthy[test]

    def _try(self, bug: Bug, copy: Copy) -> Outcome:
        spent = 0.0
        statement = statement_lines((self.root / bug.file).read_bytes(), bug.line)
        for test in bug.tests:
            seconds, reach = self._without_a_bug(test, copy)
            if not reach.runs(bug.file, statement):
                continue
            began = time.monotonic()
            with copy.with_bug(bug):
                code, said = copy.test([test], PATIENCE + 5 * seconds)
            spent += time.monotonic() - began
            if code is None or code in _FAILED:
                return self._outcome(bug, CAUGHT, spent, _first_failure(said) or test)
        return self._outcome(bug, SURVIVED, spent)

    def _outcome(self, bug: Bug, verdict: str, seconds: float = 0.0, by: str = "") -> Outcome:
        change = bug.context(self.root)
        return Outcome(bug.area, bug.file, bug.what, change, bug.drawn, verdict, round(seconds, 1), by)

    def _keep(self, outcome: Outcome) -> Outcome:
        if self._results is not None:
            with open(self._results, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(asdict(outcome)) + "\n")
        if outcome.verdict == SURVIVED:
            self._say(f"survived: {outcome.file}: {outcome.what}: {outcome.change}")
        return outcome


def _first_failure(said: str) -> str:
    return next((line.split(" - ")[0].split(" ", 1)[1] for line in said.splitlines() if line.startswith("FAILED ")), "")


def score(outcomes: Sequence[Outcome]) -> dict[str, tuple[int, int]]:
    """Area -> (caught, all that are not equivalent), and ``"all"``."""
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for outcome in outcomes:
        if outcome.verdict != EQUIVALENT:
            for area in (outcome.area, "all"):
                found[area][0] += outcome.verdict == CAUGHT
                found[area][1] += 1
    return {area: (caught, total) for area, (caught, total) in sorted(found.items())}
