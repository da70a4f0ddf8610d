"""What a function is made of: its digest is the same in every process and changes when, and only when, it should."""

from __future__ import annotations

import datetime
import decimal
import functools
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import textwrap
import types
import typing
from collections import OrderedDict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlfuncs.bundles.closure import digest_of, walk_closure
from mlfuncs.bundles.siblings import collect_siblings
from mlfuncs.bundles.source import absolute_imports, code_names, git_commit, snippet_of
from mlfuncs.errors import BundleError
from mlfuncs.interface.hints import known_hints

SHOW = "\nimport sys\nfrom mlfuncs.bundles.closure import walk_closure\nsys.stdout.write(walk_closure({name}).digest)\n"


def digest(code: str, folder: Path, name: str = "f", seed: int = 0, how: str = "script") -> str:
    """The digest of `name` when `code` runs in a process of its own: as a script, or imported."""
    folder.mkdir(parents=True, exist_ok=True)
    code = textwrap.dedent(code)
    if how == "script":
        (folder / "job.py").write_text(code + SHOW.format(name=name))
        command = [sys.executable, "job.py"]
    else:
        (folder / "job.py").write_text(code)
        command = [sys.executable, "-c", f"from job import {name}" + SHOW.format(name=name)]
    environ = {**os.environ, "PYTHONHASHSEED": str(seed)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environ, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


RICH = """
    from __future__ import annotations
    import dataclasses, datetime, enum, functools, logging, re, typing
    import numpy as np, pandas as pd
    from sklearn.linear_model import LogisticRegression

    class Color(enum.Enum):
        RED = 1
        BLUE = "b"
        def nice(self): return self.name

    @dataclasses.dataclass(frozen=True)
    class Point:
        x: float = 0.0
        tags: frozenset[str] = frozenset({"b", "a", "c"})
        kids: list[Point] = dataclasses.field(default_factory=list)

    class Base:
        def go(self): return helper(1)

    class Child(Base):
        limit: typing.ClassVar[int] = 3
        def go(self): return super().go() + self.limit

    class Pair(typing.NamedTuple):
        a: int
        b: str = "x"

    NAMES = {"x", "yy", "zzz", "alpha", "beta"}
    TABLE = {"k": {1, 2, 3}, "when": datetime.datetime(2024, 1, 1), "re": re.compile("a+")}
    WEIGHTS = np.arange(12.0).reshape(3, 4)
    FRAME = pd.DataFrame({"a": [1, 2], "b": ["x", "y"], "c": pd.to_datetime(["2024-01-01", "2024-01-02"], utc=True)})
    MODEL = LogisticRegression().fit([[0.0], [1.0]], [0, 1])
    log = logging.getLogger("x")

    @functools.lru_cache(maxsize=8)
    def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
    def even(n): return n == 0 or odd(n - 1)
    def odd(n): return n != 0 and even(n - 1)
    def helper(x, scale={"a", "b", "c"}): return x * len(scale)

    def make(k):
        seen = {"p", "q", "r"}
        def f(point: Point, color: Color = Color.RED) -> Pair:
            if color in {Color.RED, "s", "t"}: log.info("red")
            return Pair(k + helper(fib(even(4))) + Child().go(), str((NAMES, TABLE, WEIGHTS, FRAME, MODEL, seen)))
        return f
    f = make(3)
"""


def test_the_digest_is_the_same_in_other_processes_folders_and_hash_seeds(tmp_path: Path) -> None:
    # two processes that differ in everything at once: each takes seconds to import what RICH uses
    first = digest(RICH, tmp_path / "a", seed=1)
    assert digest(RICH, tmp_path / "b" / "deeper", seed=2, how="import") == first


BASE = """
    LIMIT = 3
    def helper(x): return x + LIMIT
    def unrelated(x): return x
    def f(x: int, k: int = 1) -> int:
        return helper(x) * k
"""


@functools.cache
def base_digest() -> str:
    with tempfile.TemporaryDirectory() as folder:
        return digest(BASE, Path(folder))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("def unrelated(x): return x", "def unrelated(x): return x + 1\n    OTHER = 5"),
        ("    LIMIT = 3", "    # a comment\n\n\n    LIMIT = 3  # another"),
        ("return helper(x) * k", "return (\n            helper(x)\n            * k\n        )"),
    ],
)
def test_unrelated_code_comments_and_layout_do_not_count(tmp_path: Path, old: str, new: str) -> None:
    assert old in BASE
    assert digest(BASE.replace(old, new), tmp_path / "b") == base_digest()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return x + LIMIT", "return x - LIMIT"),
        ("LIMIT = 3", "LIMIT = 4"),
        ("LIMIT = 3", "LIMIT = 3.0"),
        ("LIMIT = 3", "LIMIT = True"),
        ("k: int = 1", "k: int = 2"),
        ("k: int = 1", "k: float = 1"),
        ("k: int = 1", "*, k: int = 1"),
        ("return helper(x) * k", "'doc'\n        return helper(x) * k"),
        ("return helper(x) * k", "import math; return helper(x) * k"),
    ],
)
def test_code_constants_defaults_hints_and_docs_count(tmp_path: Path, old: str, new: str) -> None:
    assert old in BASE
    assert digest(BASE.replace(old, new), tmp_path / "b") != base_digest()


def closure_digest(target: object) -> str:
    return walk_closure(target).digest


def test_closure_values_count() -> None:
    def make(k: object):
        return lambda x: (x, k)

    assert closure_digest(make(1)) == closure_digest(make(1))
    assert closure_digest(make(1)) != closure_digest(make(2))
    assert closure_digest(make([1])) != closure_digest(make((1,)))


def test_a_type_named_only_in_a_text_annotation_counts(tmp_path: Path) -> None:
    code = """
        from __future__ import annotations
        import dataclasses
        @dataclasses.dataclass
        class Row:
            x: int = 0
        def f(row: Row) -> list[Row]: return [row]
    """
    assert digest(code, tmp_path / "a") != digest(code.replace("x: int = 0", "x: int = 1"), tmp_path / "b")


def test_classes_count_with_methods_fields_and_bases(tmp_path: Path) -> None:
    code = """
        class Base:
            def scale(self): return 2
        class f(Base):
            factor = 3
            def __init__(self, k: int = 1): self.k = k
            def __call__(self, x: int) -> int: return self.scale() * self.factor * x
    """
    first = digest(code, tmp_path / "a")
    for number, (old, new) in enumerate(
        [("return 2", "return 4"), ("factor = 3", "factor = 5"), ("k: int = 1", "k: int = 2")]
    ):
        assert digest(code.replace(old, new), tmp_path / str(number)) != first


def test_pydantic_models_have_one_digest_everywhere(tmp_path: Path) -> None:
    code = """
        from __future__ import annotations
        from pydantic import BaseModel, Field, field_validator
        class Item(BaseModel):
            price: float = Field(gt=0)
            tags: set[str] = {"a", "b"}
            @field_validator("price")
            @classmethod
            def check(cls, v): return v
        def f(item: Item) -> float: return item.price
    """
    first = digest(code, tmp_path / "a", seed=1)
    assert digest(code, tmp_path / "b", seed=2) == first
    assert digest(code.replace("gt=0", "gt=1"), tmp_path / "c") != first
    assert digest(code.replace("return v", "return v + 1"), tmp_path / "d") != first


EQUAL = [
    lambda: {"b", "a", 3, (1, "x")},
    lambda: {"a": 1, "b": [1, 2, {"c": None}]},
    lambda: [float("nan"), -0.0, 1e300, 2**100, b"\xff", "\ud800"],
    lambda: datetime.datetime(2024, 1, 2, 3, tzinfo=datetime.UTC),
    lambda: [decimal.Decimal("1.10"), pathlib.Path("a/b"), re.compile("x+", re.I)],
    lambda: [
        list[int],
        typing.List[int],  # noqa: UP006
        int | None,
        typing.Literal["a"],
        typing.Annotated[int, 5],
    ],
    lambda: OrderedDict(a=1),
    lambda: types.MappingProxyType({"a": 1}),
    lambda: [range(3), slice(1, 2), complex(1, 2), ..., NotImplemented],
]


@pytest.mark.parametrize("make", EQUAL, ids=range(len(EQUAL)))
def test_equal_values_made_twice_have_one_digest(make) -> None:
    assert digest_of(make()) == digest_of(make())


def test_sharing_of_equal_immutables_does_not_count() -> None:
    text = "".join(["same", "text"])
    when = datetime.date(2024, 1, 1)
    assert digest_of([text, text, when, when]) == digest_of(
        ["".join(["same", "text"]), text, when, datetime.date(2024, 1, 1)]
    )


def test_arrays_tables_and_models_have_a_digest_of_their_values() -> None:
    import numpy as np
    import pandas as pd
    import pyarrow as pa
    from sklearn.ensemble import RandomForestClassifier

    rows = np.arange(6.0).reshape(2, 3)
    assert digest_of(rows) == digest_of(rows.copy(order="F"))
    assert digest_of(rows) != digest_of(rows.astype("f4"))
    assert digest_of(rows) != digest_of(rows.reshape(3, 2))
    assert digest_of(np.array(["a", None], dtype=object)) == digest_of(np.array(["a", None], dtype=object))
    frame = pd.DataFrame({"a": [1, None], "b": ["x", "y"], "c": pd.Categorical(["u", "v"])})
    pieces = pd.concat([frame[["a"]], frame[["b"]], frame[["c"]]], axis=1)
    assert digest_of(frame) == digest_of(pieces) == digest_of(frame.copy())
    assert digest_of(frame) != digest_of(frame.rename(columns={"a": "z"}))
    assert digest_of(frame) != digest_of(frame.astype({"a": "Float64"}))
    assert digest_of(pa.table({"a": [1, 2, 3]}).slice(1)) == digest_of(pa.table({"a": [2, 3]}))
    forests = [RandomForestClassifier(3, random_state=0).fit([[0.0], [1.0], [2.0]], [0, 1, 1]) for _ in range(2)]
    assert digest_of(forests[0]) == digest_of(forests[1])
    other = RandomForestClassifier(3, random_state=1).fit([[0.0], [1.0], [2.0]], [1, 1, 0])
    assert digest_of(forests[0]) != digest_of(other)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4) | st.tuples(inner, inner),
    max_leaves=12,
)


def same(a: object, b: object) -> bool:
    """Equal with equal types all the way down, in order; the slow, obvious version of equal digests."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict) and isinstance(b, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)


@given(values, values)
def test_digests_are_equal_exactly_when_values_are(a: object, b: object) -> None:
    import copy

    assert digest_of(copy.deepcopy(a)) == digest_of(a)
    assert (digest_of(a) == digest_of(b)) == same(a, b)


def test_a_list_that_holds_itself_has_a_digest() -> None:
    loop: list[object] = [1]
    loop.append(loop)
    assert digest_of(loop) != digest_of([1, [1]])


def test_values_that_cannot_be_packed_name_function_variable_and_type(tmp_path: Path) -> None:
    import sqlite3
    import threading

    lock = threading.Lock()

    def guarded() -> None:
        with lock:
            pass

    with pytest.raises(
        BundleError, match=r"function 'guarded': the closure variable 'lock' holds a _thread.lock.*inside"
    ):
        walk_closure(guarded)
    connection = sqlite3.connect(":memory:")

    def query(db: object = connection) -> None: ...

    with pytest.raises(BundleError, match=r"the default of 'db' holds a sqlite3.Connection"):
        walk_closure(query)

    class Client:
        def __init__(self) -> None:
            self.worker = threading.Thread()

    client = Client()
    with pytest.raises(BundleError, match=r"'client'.*\.worker.*cannot be packed.*__init__ of a class"):
        walk_closure(lambda: client)
    rows = (n for n in range(3))
    with pytest.raises(BundleError, match=r"'rows' holds a generator"):
        walk_closure(lambda: rows)
    with (tmp_path / "log").open("w") as file, pytest.raises(BundleError, match=r"'file' holds an? _io.TextIOWrapper"):
        walk_closure(lambda: file)


def test_an_unpicklable_global_of_a_helper_names_both_functions() -> None:
    code = "import threading\nLOCK = threading.Lock()\ndef helper():\n  return LOCK\ndef main():\n  return helper()\n"
    module: dict[str, object] = {"__name__": "made_up"}
    exec(code, module)
    with pytest.raises(BundleError, match=r"function 'helper' \(used by 'main'\): the global variable 'LOCK'"):
        walk_closure(module["main"])


def test_attribute_names_are_not_taken_for_globals() -> None:
    names: dict[str, object] = {"__name__": "made_up"}
    exec("def mean(): return 1\ndef f(x): return x.mean()", names)
    before = closure_digest(names["f"])
    exec("def mean(): return 2", names)
    assert closure_digest(names["f"]) == before


def test_imports_inside_functions_are_found_relative_ones_too() -> None:
    def f() -> None:
        import json.decoder  # noqa: F401
        from os.path import join  # noqa: F401

    found = code_names(f.__code__).imports
    assert ("json.decoder", (), 0) in found
    assert ("os.path", ("join",), 0) in found
    assert absolute_imports("util", ("clean",), 2, "shop.web") == {"shop.util", "shop.util.clean"}


def test_sibling_modules_are_followed_through_packages_and_cycles(tmp_path: Path, monkeypatch) -> None:
    package = tmp_path / "shop_s"
    (package / "deep").mkdir(parents=True)
    (package / "__init__.py").write_text("from . import prices")
    (package / "prices.py").write_text("import numpy as np\nfrom .deep import core")
    (package / "deep" / "__init__.py").write_text("")
    (package / "deep" / "core.py").write_text(
        "from shop_s import prices\nimport json\ndef late():\n    import shop_s.late"
    )
    (package / "late.py").write_text("import sklearn.base")
    (package / "unused.py").write_text("import torch")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = collect_siblings(["shop_s.prices"])
    assert [module.name for module in found.packed] == [
        "shop_s",
        "shop_s.deep",
        "shop_s.deep.core",
        "shop_s.late",
        "shop_s.prices",
    ]
    assert {name.partition(".")[0] for name in found.external} == {"numpy", "sklearn"}
    assert "shop_s" not in sys.modules
    before = {module.name: module.digest for module in found.packed}
    (package / "late.py").write_text("# a comment\nimport   sklearn.base\n")
    assert {m.name: m.digest for m in collect_siblings(["shop_s.prices"]).packed} == before
    (package / "late.py").write_text("import sklearn.base\nX = 1")
    assert {m.name: m.digest for m in collect_siblings(["shop_s.prices"]).packed} != before


def test_hints_that_name_nothing_stay_text() -> None:
    names: dict[str, object] = {"__name__": "made_up"}
    exec("from __future__ import annotations\ndef f(x: Missing, y: int) -> list[str]: ...", names)
    assert known_hints(names["f"]) == {"x": "Missing", "y": int, "return": list[str]}


def test_the_source_of_a_class_and_a_function_is_theirs_alone() -> None:
    assert snippet_of(same).text.startswith("def same(a: object")
    assert snippet_of(same).text.rstrip().endswith("return repr(a) == repr(b)")


def test_the_commit_is_read_without_running_git(tmp_path: Path) -> None:
    assert git_commit(tmp_path) == ""
    commands = ["init -q", "-c user.name=a -c user.email=a@b.c commit -q --allow-empty -m one"]
    for command in commands:
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    (tmp_path / "deep").mkdir()
    assert git_commit(tmp_path / "deep") == head.strip()
    subprocess.run(["git", "pack-refs", "--all"], cwd=tmp_path, check=True)
    assert git_commit(tmp_path) == head.strip()
