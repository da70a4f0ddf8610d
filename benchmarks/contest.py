"""Contenders in processes of their own, run in turns; what each cost, and tables of it. Standard library only: peers'
environments run it as well.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

OURS = "mlfuncs"
Costs = dict[str, list[dict[str, Any]]]


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, with those that every benchmark has: where to write the figures and the plot."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="write an SVG here")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def child_command(script: str, *arguments: Any, python: str = sys.executable) -> list[str]:
    """The command that runs one contender of `script`."""
    return [python, "-W", "ignore", script, "--child", *map(str, arguments)]


def cost_of(action: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """What `action` cost this process, and what it returned.

    `start`: CPU seconds before it, imports mostly. `wall`, `cpu`: seconds. `mib`: the process's peak so far.
    """
    begun, before = time.perf_counter(), time.process_time()
    result = action()
    cost = {"start": before, "wall": time.perf_counter() - begun, "cpu": time.process_time() - before}
    return {**cost, "mib": peak_mib()}, result


def peak_mib() -> float:
    """The most memory that this process had resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(command: Sequence[str], timeout_s: float | None = None) -> dict[str, Any]:
    """What a child printed as JSON on its last line. Raises RuntimeError with its last words."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"took longer than {timeout_s:.0f} s") from None
    if done.returncode:
        raise RuntimeError("; ".join(done.stderr.strip().splitlines()[-2:]) or f"exit code {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def in_turns(commands: Mapping[str, Sequence[str]], rounds: int, timeout_s: float | None = None) -> Costs:
    """Each command `rounds` times, one after the other; a peer that fails is left out, and why is said."""
    costs: Costs = {name: [] for name in commands}
    for number in range(rounds):
        for name in list(costs):
            say(f"  round {number + 1} of {rounds}: {name}")
            try:
                costs[name].append(run(commands[name], timeout_s))
            except RuntimeError as exc:
                if name == OURS:
                    raise SystemExit(f"{name} failed: {exc}") from exc
                say(f"  {name} is left out: {exc}")
                del costs[name]
    return costs


def medians(costs: Costs, keys: Sequence[str] = ("wall", "cpu", "mib", "start")) -> dict[str, dict[str, float]]:
    """The median of each figure, by contender."""
    return {name: {key: statistics.median(one[key] for one in runs) for key in keys} for name, runs in costs.items()}


def agree(costs: Costs, exact: Sequence[str], close: Sequence[str] = ()) -> None:
    """Raise SystemExit unless all runs answered the same: `exact` keys equal, `close` ones to 1e-9 of each other."""
    first = costs[OURS][0]
    for name, runs in costs.items():
        for one in runs:
            wrong = [key for key in exact if one[key] != first[key]]
            wrong += [key for key in close if abs(one[key] - first[key]) > 1e-9 * abs(first[key])]
            if wrong:
                raise SystemExit(f"{name} disagrees on {wrong[0]}: {one[wrong[0]]}, not {first[wrong[0]]}")


def keyed_sum(entities: Any, times_us: Any, values: Any) -> int:
    """A checksum of (entity, time, value) rows in any order: int64 (n,), int64 (n,), float64 or int64 (n,); NaN is
    left out. Equal for the same rows bit for bit, and hardly ever for others.
    """
    import numpy as np

    numbers = np.asarray(values)
    kept = ~np.isnan(numbers) if numbers.dtype.kind == "f" else np.ones(len(numbers), bool)
    bits = np.ascontiguousarray(numbers[kept].astype(np.float64)).view(np.uint64)
    with np.errstate(over="ignore"):
        key = np.asarray(entities)[kept].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        key = (key ^ np.asarray(times_us)[kept].astype(np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)
        return int(((key ^ (key >> np.uint64(29))) * bits).sum(dtype=np.uint64))


def say(text: str) -> None:
    """A line of progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def show(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose first column is to the left."""
    print(title)
    for row in [["", *heads], *rows]:
        print(f"  {row[0]:32}" + "".join(f"{cell:>16}" for cell in row[1:]))


def finish(options: argparse.Namespace, figures: Any, draw: Callable[[Path, Any], None]) -> None:
    """Write the figures and the plot where they were asked for."""
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=1))
    if options.plot:
        draw(options.plot, figures)
