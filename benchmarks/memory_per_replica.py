"""What one more replica adds to memory, forked or spawned, with numpy, pandas, scikit-learn and a model loaded.

    python benchmarks/memory_per_replica.py [--replicas 6] [--requests 200] [--json FILE]

From /proc/PID/smaps_rollup, once every replica has answered `--requests` predictions. Private pages (USS) are what the
end of a replica gives back; PSS counts a page that n processes share as 1/n of it. "group" is the sum of PSS over all
replicas and, for forks, the zygote: what the machine pays for all of them, the pages they share counted once.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from cold_start import BODY, Unix, predict_when_ready, prepared

_FIELDS = {"Rss": "rss", "Pss": "pss", "Private_Clean": "uss", "Private_Dirty": "uss"}


def memory_mib(pid: int) -> dict[str, float]:
    """Resident, proportional and private MiB of one process."""
    found = dict.fromkeys(_FIELDS.values(), 0.0)
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        if name in _FIELDS:
            found[_FIELDS[name]] += int(rest.split()[0]) / 1024
    return found


def start(count: int, requests: int, one: Callable[[int], tuple[str, int]]) -> list[int]:
    """The pids of that many replicas, each of which has answered that many predictions."""
    pids = []
    for number in range(count):
        path, pid = one(number)
        predict_when_ready(path)
        with closing(Unix(path)) as connection:
            for _ in range(requests):
                predict(connection)
        pids.append(pid)
    return pids


def predict(connection: http.client.HTTPConnection) -> None:
    """One prediction on a kept connection."""
    connection.request("POST", "/", BODY, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"the worker answered {answer.status}: {answer.read().decode()}")
    answer.read()


def figures(replicas: Sequence[int], beside: Sequence[int] = ()) -> dict[str, float]:
    """Medians over the replicas, and the sum over the group."""
    each = [memory_mib(pid) for pid in replicas]
    medians = {name: statistics.median(one[name] for one in each) for name in ("uss", "pss", "rss")}
    group = sum(one["pss"] for one in each) + sum(memory_mib(pid)["pss"] for pid in beside)
    return {**medians, "group": group}


def main() -> None:
    """Run both ways and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=6)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = {}
    with prepared() as workers:
        zygote = workers.start_zygote()
        found["forked"] = figures(start(options.replicas, options.requests, workers.fork), [zygote])
    with prepared() as workers:
        found["spawned"] = figures(start(options.replicas, options.requests, workers.spawn))
    print(f"| MiB, {options.replicas} replicas | private (USS) | PSS | RSS | group |\n|---|---:|---:|---:|---:|")
    for name, values in found.items():
        print(f"| {name} | " + " | ".join(f"{values[key]:,.1f}" for key in ("uss", "pss", "rss", "group")) + " |")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
