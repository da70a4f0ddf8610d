"""Every feature-store benchmark, one after the other, with its table and plot: about ten minutes on a quiet machine.

    python benchmarks/featurestore.py                     # full size; plots into docs/images
    python benchmarks/featurestore.py --small             # a hundredth of the rows, plots into the results folder
    python benchmarks/featurestore.py --feast-join        # Feast's join at full size too: minutes more, 10 GB of memory

A part that was finished by this revision of the code at this size is not run again, so a run that was broken off goes
on where it stopped; `--fresh` starts over. Tables and figures stay below ~/.cache/mlfuncs-benchmarks/results.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

from contest import say
from peers import CACHE

HERE = Path(__file__).parent
IMAGES = HERE.parent / "docs" / "images"
SMALL = {
    "join": ["--spine", "20000", "--history", "200000", "--entities", "2000", "--rounds", "1"],
    "windows": ["--events", "20000", "--entities", "200", "--storey-events", "2000", "--rounds", "1"],
    "online": ["--seconds", "0.1", "--rounds", "2"],
    "ingest": ["--rows", "1000000"],
    "import": ["--rounds", "1"],
}


def revision() -> str:
    """A name for the code as it is now: that of the benchmarks and of the feature store, committed or not."""
    digest = hashlib.sha256()
    for folder in (HERE, HERE.parent / "featurestore", HERE.parent / "mlfuncs"):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def run_part(name: str, arguments: list[str], results: Path, images: Path) -> bool:
    """Run one benchmark unless its results are there; whether it went well."""
    mark = f"{name}-feast" if "--feast" in arguments else name  # the join with Feast is another run
    table, part = results / f"{mark}.txt", results / f"{mark}.part"
    if table.exists():
        say(f"{name}: done before")
        print(table.read_text())
        return True
    say(f"{name} ...")
    begun = time.monotonic()
    plot = results / f"featurestore_{name}.svg"
    command = [sys.executable, str(HERE / f"featurestore_{name}.py"), *arguments]
    command += ["--json", str(results / f"{name}.json"), "--plot", str(plot)]
    with part.open("w") as out:
        done = subprocess.run(command, stdout=out, check=False)
    text = part.read_text()
    print(text, flush=True)
    if done.returncode:
        say(f"{name} failed with exit code {done.returncode}")
        return False
    if images != results:
        images.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plot, images / plot.name)
    part.rename(table)
    say(f"{name}: {time.monotonic() - begun:.0f} s")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a hundredth of the rows")
    parser.add_argument("--feast-join", action="store_true", help="Feast's join too")
    parser.add_argument("--fresh", action="store_true", help="run finished parts again")
    parser.add_argument("--only", nargs="*", default=list(SMALL), choices=list(SMALL))
    options = parser.parse_args()
    results = CACHE / "results" / f"featurestore-{'small' if options.small else 'full'}-{revision()}"
    if options.fresh:
        shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "mlfuncs_featurestore.kernels"], check=True, stdout=subprocess.DEVNULL)
    failed = []
    for name in options.only:
        arguments = list(SMALL[name]) if options.small else []
        arguments += ["--feast"] if name == "join" and options.feast_join else []
        if not run_part(name, arguments, results, results if options.small else IMAGES):
            failed.append(name)
    say(f"figures and tables: {results}")
    if failed:
        say(f"failed: {', '.join(failed)}; the same command runs them again")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
