"""Faults against the real program under the real torchrun, drawn from a seed: python tests/faults --kills 200 --jobs 8

CPU only. Needs torch, megatron-core, and what the package itself needs. Ends with exit code 1 when anything was lost,
a number differs, or the program did not do what docs/reliability.md says.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Lock

from chain import Chain, Outcome
from directory import MOUNTED
from launch import PATIENCE, STARTED, Launch, Numbers, environment, read_numbers
from layouts import LAYOUTS, STEPS, Layout
from plan import plan


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python tests/faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="kills in all")
    parser.add_argument(
        "--others", type=int, help="full disks, removed directories, damaged files, ...; default kills/5"
    )
    parser.add_argument("--seed", type=int, default=1, help="the same seed draws the same faults")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, of up to 2 ranks each")
    parser.add_argument("--layouts", nargs="*", choices=[*LAYOUTS], default=[*LAYOUTS], metavar="NAME")
    parser.add_argument("--work", type=Path, help="directory for the runs; default a temporary one")
    parser.add_argument("--keep", action="store_true", help="keep it; after a failure it is kept anyway")
    parser.add_argument("--out", type=Path, help="every fault and its outcome as JSON")
    options = parser.parse_args()
    if options.others is None:
        options.others = options.kills // 5
    return options


def make_data(work: Path) -> str:
    """Prefix of byte-tokenised data, made by ``prepare``."""
    texts = (f"{i} times {i} is {i * i}; " + "lorem ipsum dolor " * (i % 5) for i in range(400))
    (work / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    command = ["prepare", "--input", str(work / "text.jsonl"), "--output-prefix", str(work / "data")]
    done = subprocess.run(
        [sys.executable, "-m", "phd_megatron", *command, "--tokenizer", "byte"],
        env=environment(),
        capture_output=True,
        text=True,
        cwd=work,
    )
    if done.returncode:
        raise SystemExit(f"prepare failed:\n{done.stdout}{done.stderr}")
    return str(work / "data")


def undisturbed(layout: Layout, data: str, work: Path) -> Numbers:
    """Numbers of the run that nothing happens to, and that saves nothing."""
    run = Launch(layout.ranks, [*layout.command(data), "--exit-interval", str(STEPS)], work)
    run.wait_gone(PATIENCE)
    numbers = read_numbers(run.metrics)
    if run.agent.returncode or len(numbers) != STEPS:
        raise SystemExit(f"the undisturbed run of {layout.name} failed:\n{run.output}")
    return numbers


def table(outcomes: list[Outcome]) -> str:
    """Faults by kind and layout; of those that failed how many, after an exclamation mark."""
    names = sorted({outcome.layout for outcome in outcomes}, key=[*LAYOUTS].index)
    count: Counter[tuple[str, str]] = Counter()
    failed: Counter[tuple[str, str]] = Counter()
    for outcome in outcomes:
        kind = "could not be tried here" if outcome.skipped else outcome.fault["kind"]
        moment = outcome.fault["moment"]
        row = f"{kind}, {moment}" if "kill -9" in kind else kind
        for key in ((row, outcome.layout), (row, "all"), ("all", outcome.layout), ("all", "all")):
            count[key] += 1
            failed[key] += bool(outcome.problems)

    def cell(row: str, name: str) -> str:
        shown = str(count[row, name] or "")
        return f"{shown} !{failed[row, name]}" if failed[row, name] else shown

    rows = [*sorted({row for row, _ in count} - {"all"}), "all"]
    lines = [["fault", *names, "all"], *([row, *(cell(row, name) for name in [*names, "all"])] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(" | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def end_early(number: int, _: object) -> None:
    """Leave no process and no mounted disk behind."""
    for launch in [*STARTED]:
        launch.kill_all()
    for disk in [*MOUNTED]:
        disk.close()
    os._exit(128 + number)


def main() -> int:
    """Plan, run, report."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end_early)
    options = parse()
    began = time.monotonic()
    work = (options.work or Path(tempfile.mkdtemp(prefix="phd-faults-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    chosen = [LAYOUTS[name] for name in options.layouts]
    data = make_data(work)
    lock, done = Lock(), 0
    total = options.kills + options.others

    def say(outcome: Outcome) -> None:
        nonlocal done
        with lock:
            done += outcome.fault["kind"] != "none, at the end"
            fault = outcome.fault
            what = f"{fault['kind']}, {fault['moment']}" + (f" ({outcome.detail})" if outcome.detail else "")
            path = f"{outcome.resumed_from} -> {outcome.newest_after}"
            verdict = "; ".join(outcome.problems) or outcome.skipped or "held"
            print(f"[{done}/{total}, {outcome.seconds:.0f} s] {outcome.layout}: {what}: {path}: {verdict}", flush=True)
            if outcome.problems:
                print(f"    see {outcome.logs}", flush=True)

    # At least as many chains as jobs, and every layout.
    chains = plan(options.seed, options.kills, options.others, chosen, max(options.jobs, len(chosen)))
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = {
            layout.name: pool.submit(undisturbed, layout, data, work / f"whole{n}") for n, layout in enumerate(chosen)
        }
        references = {name: run.result() for name, run in runs.items()}
        print(f"{len(references)} undisturbed runs of {STEPS} steps in {time.monotonic() - began:.0f} s", flush=True)
        started = [
            pool.submit(Chain(layout, faults, data, references[layout.name], work / f"chain{n}").run, say)
            for n, (layout, faults) in enumerate(chains)
            if faults
        ]
        outcomes = [outcome for chain in started for outcome in chain.result()]

    failed = [outcome for outcome in outcomes if outcome.problems]
    kills = sum("kill -9" in outcome.fault["kind"] for outcome in outcomes)
    lost = sum(any(problem.startswith(("LOST", "WRONG")) for problem in outcome.problems) for outcome in failed)
    seconds = time.monotonic() - began
    summary = (
        f"seed {options.seed}: {kills} kills and {total - kills} other faults over {len(chosen)} layouts "
        f"in {seconds:.0f} s; {lost} with a loss or another number, {len(failed) - lost} with another defect"
    )
    print(f"\n{table(outcomes)}\n\n{summary}")
    if options.out:
        content = {"summary": summary, "seed": options.seed, "kills": kills, "seconds": seconds, "lost": lost}
        content |= {"failed": len(failed), "outcomes": [asdict(outcome) for outcome in outcomes]}
        options.out.write_text(json.dumps(content, indent=1), encoding="utf-8")
    if failed:
        print(f"logs: {work}")
    elif not options.keep:
        shutil.rmtree(work)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
