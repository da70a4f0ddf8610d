"""Run by the Dockerfile's first stage: what to install, where our packages will be, and the command.

python prepare.py PYPROJECT REQUIREMENTS [EXTRA...]
"""

import pathlib
import sys
import tomllib

ROOT = pathlib.Path("/opt/mlfuncs")
SOURCES = ("", "runtime", "pipelines", "featurestore")
HOME = pathlib.Path("/home-of-mlfuncs")  # becomes an empty directory that the image's user owns
COMMAND = f"#!{ROOT}/bin/python\nfrom mlfuncs.cli import main\n\nmain()\n"


PLATFORM = ("featurestore", "postgres", "triggers")  # what the extra "platform" stands for here


def requirements(project: dict, extras: list[str]) -> list[str]:
    """The PEP 508 lines of the core and of `extras`, those of ours that they name resolved. uv, which is large, is for
    the platform alone: functions' containers build no environments."""
    optional = {**project["optional-dependencies"], "platform": [f"mlfuncs[{','.join(PLATFORM)}]"]}
    lines = [line for line in project["dependencies"] if "platform" in extras or not line.startswith("uv>")]
    waiting = list(extras)
    while waiting:
        for line in optional[waiting.pop()]:
            if line.startswith("mlfuncs["):
                waiting += line.partition("[")[2].rstrip("]").split(",")
            else:
                lines.append(line)
    return lines


def main(pyproject: str, target: str, *extras: str) -> None:
    """Write the requirements, the path file of our packages, and the command."""
    project = tomllib.loads(pathlib.Path(pyproject).read_text(encoding="utf-8"))["project"]
    names = [name for text in extras for name in text.split()]
    pathlib.Path(target).write_text("\n".join(requirements(project, names)), encoding="utf-8")
    site = next((ROOT / "lib").glob("python*/site-packages"))
    (site / "mlfuncs.pth").write_text("\n".join(str(ROOT / "src" / part) for part in SOURCES), encoding="utf-8")
    command = ROOT / "bin" / "mlfuncs"
    command.write_text(COMMAND, encoding="utf-8")
    command.chmod(0o755)
    HOME.mkdir()


if __name__ == "__main__":
    main(*sys.argv[1:])
