"""Values of the user's own classes can be read where those classes are, and where they are not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MODULE = """
import numpy as np
from shop_base import Base
SCALE = 3
def helper(x): return x * SCALE
class Net(Base):
    def __init__(self, k): self.k = k
    def predict(self, x): return helper(x) + self.k + self.offset()
"""
WRITE = """
import sys
from mlfuncs.bundles.portable import dump_portable
from shop_nets import Net, helper
class Local:
    def go(self): return 5
with open(sys.argv[1], "wb") as sink:
    dump_portable({"net": Net(2), "cls": Net, "nets": [Net(1)], "helper": helper, "local": Local()}, sink)
"""
READ = """
import pickle, sys
got = pickle.load(open(sys.argv[1], "rb"))
assert type(got["net"]) is got["cls"] and type(got["nets"][0]) is got["cls"]
print(got["net"].predict(2), got["helper"](1), got["local"].go(), type(got["net"]).__mro__[1].__name__, end=" ")
import importlib.util
print(importlib.util.find_spec("shop_nets") is not None and got["cls"] is __import__("shop_nets").Net)
"""


def run(code: str, folder: Path, file: Path) -> str:
    folder.mkdir(exist_ok=True)
    script = folder / "main.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script), str(file)], capture_output=True, text=True, cwd=folder, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_values_are_read_with_and_without_the_users_files(tmp_path: Path) -> None:
    author = tmp_path / "author"
    author.mkdir()
    (author / "shop_nets.py").write_text(MODULE)
    (author / "shop_base.py").write_text("class Base:\n    def offset(self): return 10")
    file = tmp_path / "values.pkl"
    run(WRITE, author, file)
    assert run(READ, tmp_path / "elsewhere", file) == "18 3 5 Base False\n"
    assert run(READ, author, file) == "18 3 5 Base True\n"


FIT = """
import threading
import mlfuncs as ml
LOCK = threading.Lock()
class Net:
    def fit(self, x): return self
    def get_params(self, deep=True): return {}
    def predict(self, x): return x + 1
class Locked(Net):
    def predict(self, x):
        with LOCK: return x + 2
def fit() -> Net:
    return Net()
if __name__ == "__main__":
    from mlfuncs.artifacts import ArtifactStore
    import json, shop_fit
    store = ArtifactStore.open(ml.read_settings())
    refs = [ml.run(fit).outputs["output"].ref, ml.run(shop_fit.fit).outputs["output"].ref, store.put(shop_fit.Locked())]
    print(json.dumps([ref.to_dict() for ref in refs]))
"""
LOAD = """
import json, sys
import mlfuncs as ml
from mlfuncs.artifacts import ArtifactRef, ArtifactStore
store = ArtifactStore.open(ml.read_settings())
for ref in json.loads(open(sys.argv[1]).read()):
    try:
        print(store.get(ArtifactRef.from_dict(ref)).predict(1), end=" ")
    except ml.MlfuncsError as exc:
        print(exc)
"""


def test_models_of_the_users_files_are_loaded_by_workers_that_have_not_the_files(tmp_path: Path) -> None:
    author = tmp_path / "author"
    author.mkdir()
    (author / "shop_fit.py").write_text(FIT)
    refs = tmp_path / "refs.json"
    refs.write_text(run(FIT, author, refs))
    assert run(LOAD, author, refs) == "2 2 3 "
    away = run(LOAD, tmp_path / "elsewhere", refs)
    assert away.startswith("2 2 the object needs code that is not installed here: No module named 'shop_fit'")


def test_installed_classes_go_by_name_alone(tmp_path: Path) -> None:
    import io
    import pickle
    from decimal import Decimal

    import numpy as np

    from mlfuncs.bundles.portable import dump_portable

    sink = io.BytesIO()
    dump_portable([np.float64, Decimal("1")], sink)
    assert b"_import_or_build" not in sink.getvalue()
    assert pickle.loads(sink.getvalue()) == [np.float64, Decimal("1")]
