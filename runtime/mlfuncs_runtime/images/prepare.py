"""Run by the Dockerfile's first stage: what to install, where our packages will be, and the command.

python prepare.py PYPROJECT REQUIREMENTS [EXTRA...]
python prepare.py --libraries       after the installation: let the loader find what NVIDIA's distributions bring
python prepare.py --compile FOLDER  write byte code that has no times in it
"""

import os
import pathlib
import subprocess
import sys
import sysconfig
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
    own, wanted = f"{sys.version_info.major}.{sys.version_info.minor}", os.environ.get("FOR_PYTHON")
    if wanted and wanted != own:
        sys.exit(f"this Python image has Python {own}, and the functions are packed for {wanted}")
    project = tomllib.loads(pathlib.Path(pyproject).read_text(encoding="utf-8"))["project"]
    names = [name for text in extras for name in text.split()]
    pathlib.Path(target).write_text("\n".join(requirements(project, names)), encoding="utf-8")
    site = next((ROOT / "lib").glob("python*/site-packages"))
    (site / "mlfuncs.pth").write_text("\n".join(str(ROOT / "src" / part) for part in SOURCES), encoding="utf-8")
    command = ROOT / "bin" / "mlfuncs"
    command.write_text(COMMAND, encoding="utf-8")
    command.chmod(0o755)
    HOME.mkdir()


def show_libraries(loader: pathlib.Path = pathlib.Path("/etc/ld.so.conf.d")) -> None:
    """Name the folders with NVIDIA's libraries to the loader, behind those that a distribution finds by itself."""
    places = sorted(map(str, pathlib.Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/lib")))
    if places:
        (loader / "mlfuncs.conf").write_text("\n".join(places) + "\n", encoding="utf-8")
        subprocess.run(["ldconfig"], check=True)


def compile_below(folder: str) -> None:
    """Write byte code for a read-only image. A file that does not compile, e.g. a template, would not run either."""
    command = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", folder]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=False)


if __name__ == "__main__":
    if sys.argv[1] == "--libraries":
        show_libraries()
    elif sys.argv[1] == "--compile":
        compile_below(sys.argv[2])
    else:
        main(*sys.argv[1:])
