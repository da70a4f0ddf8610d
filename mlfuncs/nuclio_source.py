"""Functions written for Nuclio, taken as they are: a nuclio-jupyter notebook, or a function.yaml.

A notebook's cells are its code, except those with `# nuclio: ignore`, or all outside of `# nuclio: start-code` and
`# nuclio: end-code`; `%nuclio env`, `cmd`, `config`, `env_file` and `mount` lines and cells are its configuration.
"""

from __future__ import annotations

import base64
import binascii
import json
import linecache
import re
import shlex
import sys
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import BundleError, MissingExtra, NotFound, SpecError
from mlfuncs.nuclio_magics import configure
from mlfuncs.spec import Pod, Resources, Scale, slugify

if TYPE_CHECKING:
    from mlfuncs.decorator import Function

_MARK = r"^[ \t]*#[ \t]*(?:nuclio|mlrun):[ \t]*"
_IGNORE = re.compile(_MARK + "ignore", re.M)
_START = re.compile(_MARK + r"start-code[^\n]*\n?", re.M)
_END = re.compile(_MARK + "end-code", re.M)
_MAGIC = re.compile(r"^[ \t]*(%%?)nuclio[ \t]+(\w+)[ \t]*(.*)$", re.M)
_IGNORED_TAGS = {"nuclio-ignore", "mlrun-ignore"}


@dataclass
class NuclioSource:
    """Code with its configuration in Nuclio's own form: `config` is a function.yaml as a dict."""

    name: str
    code: str
    config: dict[str, Any] = field(default_factory=lambda: {"spec": {}})

    @property
    def handler(self) -> str:
        """The name of the handler in the code."""
        return str(self.config["spec"].get("handler") or "handler").rpartition(":")[2]


def is_nuclio(target: str) -> bool:
    """Whether `target` of a command line names a whole notebook or function.yaml, and not FILE:NAME."""
    return target.endswith((".ipynb", ".yaml", ".yml"))


def load_deployable(target: str, cwd: Path | None = None) -> Function[Any, Any]:
    """What "FILE:NAME" names, or the Nuclio function that a notebook or a function.yaml is.

    Raises NotFound, SpecError (it says what cannot be taken over) or BundleError (the code raised).
    """
    if not is_nuclio(target):
        from mlfuncs.loading import load_target

        return load_target(target, cwd)
    path = ((cwd or Path.cwd()) / target).absolute()
    if not path.is_file():
        raise NotFound("file", target, [near.name for near in path.parent.glob(f"*{path.suffix}")])
    source = read_notebook(path) if path.suffix == ".ipynb" else read_function_yaml(path)
    return to_function(source, path)


def read_notebook(path: Path) -> NuclioSource:
    """The function in a notebook. Raises SpecError for a magic that cannot be taken over."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError, UnicodeDecodeError) as exc:
        raise SpecError(f"{path.name} is not a notebook: {exc}") from exc
    found = NuclioSource(slugify(path.stem), "")
    parts = [_take_magic(text, found, path) for text in _function_cells(cells)]
    found.code = "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"
    return found


def read_function_yaml(path: Path) -> NuclioSource:
    """What a function.yaml describes; its code is in the file, or beside it. Raises SpecError or NotFound."""
    try:
        import yaml
    except ModuleNotFoundError as exc:
        raise MissingExtra("a function.yaml (PyYAML)", "nuclio") from exc

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        spec = config["spec"]
    except (yaml.YAMLError, KeyError, TypeError) as exc:
        raise SpecError(f"{path.name} is not a Nuclio function: {exc}") from exc
    runtime = str(spec.get("runtime") or "python")
    if not runtime.startswith("python"):
        raise SpecError(f"{path.name} has the runtime {runtime!r}: only Python functions can be taken over")
    name = slugify(str((config.get("metadata") or {}).get("name") or path.parent.name))
    encoded = (spec.get("build") or {}).get("functionSourceCode")
    if encoded:
        try:
            return NuclioSource(name, base64.b64decode(encoded, validate=True).decode("utf-8"), config)
        except (binascii.Error, UnicodeDecodeError) as exc:
            raise SpecError(f"{path.name}: functionSourceCode is not base64 of text: {exc}") from exc
    module = str(spec.get("handler") or "").partition(":")[0] or path.stem
    file = path.parent / (spec.get("build") or {}).get("path", "") / f"{module}.py"
    if not file.is_file():
        raise NotFound("file", file.name, [near.name for near in path.parent.glob("*.py")])
    return NuclioSource(name, file.read_text(encoding="utf-8"), config)


def to_function(source: NuclioSource, path: Path) -> Function[Any, Any]:
    """The handler, loaded, under the spec that its configuration says. Raises BundleError, NotFound, SpecError."""
    from mlfuncs.decorator import function_of

    module = _load(source, path)
    handler = getattr(module, source.handler, None)
    if not callable(handler):
        names = [name for name, value in vars(module).items() if callable(value)]
        raise NotFound("handler", source.handler, names, hint=f"in {path.name}")
    return function_of(handler, **spec_options(source))


def spec_options(source: NuclioSource) -> dict[str, Any]:
    """The options of `ml.function` that say what Nuclio's configuration does."""
    spec = source.config["spec"]
    options: dict[str, Any] = {"name": source.name}
    build = spec.get("build") or {}
    if commands := list(build.get("commands") or ()):
        options["requirements"] = requirements_of(commands)
    env, secrets = _environment(spec.get("env") or ())
    options |= {"env": env, "secrets": secrets}
    limits = {
        **((spec.get("resources") or {}).get("requests") or {}),
        **((spec.get("resources") or {}).get("limits") or {}),
    }
    if limits:
        options["resources"] = _resources(limits)
    if volumes := _volumes(spec.get("volumes") or (), source.name):
        options["pod"] = Pod(volumes=volumes)
    scale = _scale(spec)
    if scale is not None:
        options["scale"] = scale
    if timeout := spec.get("eventTimeout"):
        options["timeout_s"] = _seconds(str(timeout))
    return options


def requirements_of(commands: Iterable[str]) -> list[str]:
    """What `pip install` commands install. Raises SpecError for any other command.

    >>> requirements_of(["pip install 'scikit-learn>=1.5' numpy", "python -m pip install -U six"])
    ['scikit-learn>=1.5', 'numpy', 'six']
    """
    found: list[str] = []
    for command in commands:
        words = shlex.split(command)
        words = words[2:] if words[:2] in (["python", "-m"], ["python3", "-m"]) else words
        if words[:2] not in (["pip", "install"], ["pip3", "install"]) or "-r" in words or "--requirement" in words:
            raise SpecError(
                f"the build command {command!r} cannot be taken over: only 'pip install NAME ...' can; put the rest "
                "into an image of your own and set MLFUNCS_BASE_IMAGE"
            )
        found += [word for word in words[2:] if not word.startswith("-")]
    return found


def _function_cells(cells: Iterable[Mapping[str, Any]]) -> list[str]:
    """The text of the cells that belong to the function; from start-code to end-code when there are such marks."""
    kept: list[str] = []
    started = ended = False
    for cell in cells:
        text = "".join(cell.get("source") or "")
        tags = set((cell.get("metadata") or {}).get("tags") or ())
        if cell.get("cell_type") != "code" or _IGNORE.search(text) or tags & _IGNORED_TAGS:
            continue
        if start := _START.search(text):
            if not started:
                kept = []
            text, started, ended = text[start.end() :], True, False
        if end := _END.search(text):
            if not ended:
                kept.append(text[: end.start()])
            ended = True
            continue
        if not ended:
            kept.append(text)
    return kept


def _take_magic(text: str, found: NuclioSource, path: Path) -> str:
    """The cell's Python; its %nuclio lines, or the whole cell under %%nuclio, go into the configuration."""
    cell = next((match for match in _MAGIC.finditer(text) if match[1] == "%%"), None)
    if cell is not None:
        configure(found, cell[2], [cell[3], *text[cell.end() :].splitlines()], path)
        return ""
    for match in _MAGIC.finditer(text):
        configure(found, match[2], [match[3]], path)
    lines = [line for line in text.splitlines() if not line.lstrip().startswith(("%", "!"))]
    return "\n".join(lines)


def _environment(items: Iterable[Mapping[str, Any]]) -> tuple[dict[str, str], list[str]]:
    """Variables with values, and the names of those that come from a Kubernetes Secret."""
    env: dict[str, str] = {}
    secrets: list[str] = []
    for item in items:
        if "valueFrom" in item:
            secrets.append(item["name"])
        else:
            env[item["name"]] = str(item.get("value", ""))
    return env, secrets


def _resources(limits: Mapping[str, Any]) -> Resources:
    cpu, gpu = str(limits.get("cpu") or ""), limits.get("nvidia.com/gpu") or 0
    try:
        cores = float(cpu[:-1]) / 1000 if cpu.endswith("m") else float(cpu) if cpu else None
        gpus = int(gpu)
    except ValueError as exc:
        raise SpecError(
            f"resources of cpu {cpu!r} and nvidia.com/gpu {gpu!r} are no numbers like '500m' and 1"
        ) from exc
    return Resources(cpu=cores, memory=str(limits["memory"]) if limits.get("memory") else None, gpu=gpus)


def _volumes(items: Iterable[Mapping[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    """Mount path to volume source. Raises SpecError for a sub-path, which a pod's volume has no word for."""
    found: dict[str, dict[str, Any]] = {}
    for item in items:
        volume, mount = dict(item["volume"]), item["volumeMount"]
        if mount.get("subPath"):
            raise SpecError(f"{name}: the volume at {mount['mountPath']!r} has a subPath: mount the volume itself")
        volume.pop("name", None)
        found[str(mount["mountPath"])] = volume
    return found


def _scale(spec: Mapping[str, Any]) -> Scale | None:
    """Replicas, and one request at once for each worker of the HTTP trigger, as Nuclio's workers take."""
    fixed = spec.get("replicas")
    low, high = spec.get("minReplicas", fixed), spec.get("maxReplicas", fixed)
    workers = [
        trigger.get("numWorkers") or trigger.get("maxWorkers") or 0
        for trigger in (spec.get("triggers") or {}).values()
        if trigger.get("kind") == "http"
    ]
    if low is None and high is None and not any(workers):
        return None
    lowest = int(low or 0)
    highest = max(int(high or 4), lowest, 1)
    return Scale(
        min=lowest, max=highest, concurrency=int(max(workers, default=0)), initial=min(max(1, lowest), highest)
    )


def _seconds(text: str) -> float:
    """Seconds in a Go duration like "1m30s". Raises SpecError.

    >>> _seconds("1m30s")
    90.0
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise SpecError(f"the duration {text!r} is not like '90s' or '1m30s'")
    return sum(float(number) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[unit] for number, unit in parts)


def _load(source: NuclioSource, path: Path) -> types.ModuleType:
    name, filename = re.sub(r"\W", "_", source.name), f"{path}#nuclio"
    if name in sys.stdlib_module_names or name in sys.modules:
        name = f"{name}_nuclio"
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    linecache.cache[filename] = (len(source.code), None, source.code.splitlines(keepends=True), filename)
    try:
        exec(compile(source.code, filename, "exec", dont_inherit=True), module.__dict__)
    except Exception as exc:
        sys.modules.pop(name, None)
        raise BundleError(f"{path.name} cannot be loaded: {type(exc).__name__}: {exc}") from exc
    return module
