"""A decorated function stays a plain function: its call, signature, traceback and pickle."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys
import textwrap
import traceback

import pytest

import mlfuncs as ml
from mlfuncs.decorator import Function, function_of
from mlfuncs.errors import SignatureError, SpecError


@ml.function
def double(x: float, *, plus: int = 0) -> float:
    """Twice x."""
    return 2 * x + plus


@ml.function(name="a-model", secrets=["DB_PASSWORD"], timeout_s=5)
class Model:
    """Adds an offset."""

    def __init__(self, offset: int = 1) -> None:
        self.offset = offset

    def __call__(self, x: int) -> int:
        return x + self.offset


@ml.function
def countdown(n: int) -> list[int]:
    return [n, *countdown(n - 1)] if n else [0]


def run_script(code: str, folder, *arguments: str) -> str:
    script = folder / "script.py"
    script.write_text(textwrap.dedent(code))
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, cwd=folder, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_call_is_the_plain_call() -> None:
    assert double(4) == 8
    assert double(x=1, plus=3) == 5
    assert countdown(2) == [2, 1, 0]


def test_name_doc_and_signature_are_the_users_own() -> None:
    assert double.__name__ == "double"
    assert double.__doc__ == "Twice x."
    assert inspect.signature(double) == inspect.signature(double.target)
    assert repr(double).startswith("<mlfuncs function 'double'(x")


def test_no_frame_of_ours_is_in_a_traceback() -> None:
    @ml.function
    def broken() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        broken()
    assert [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)][1:] == ["broken"]


def test_options_go_into_the_spec() -> None:
    assert Model.spec.name == "a-model"
    assert Model.spec.secrets == ("DB_PASSWORD",)
    assert double.with_options(retries=2).spec.retries == 2
    assert double.spec.retries == 0


half = lambda x: x / 2  # noqa: E731
once = twice = lambda x: x


def test_a_name_is_made_from_the_functions_own() -> None:
    assert double.spec.name == "double"
    assert function_of(lambda x: x).spec.name == "lambda"
    assert function_of(half).spec.name == "half"  # a lambda that one variable holds
    assert function_of(once).spec.name == function_of(twice).spec.name == "lambda"


def test_a_decorated_class_is_still_a_class_to_its_users() -> None:
    model = Model(5)
    assert model(1) == 6
    assert isinstance(model, Model)

    class Child(Model):
        pass

    assert issubclass(Child, Model)
    assert Child(2)(2) == 4


def test_a_decorated_method_is_bound_as_a_method() -> None:
    class Holder:
        factor = 3

        @ml.function
        def times(self, x: int) -> int:
            return self.factor * x

    assert Holder().times(2) == 6


def test_an_unknown_option_is_refused_by_name() -> None:
    with pytest.raises(SpecError, match=r"unknown option 'replicas'.*known: .*scale"):
        ml.function(replicas=3)(lambda x: x)


def test_a_misspelt_option_is_told_the_name_that_was_meant() -> None:
    with pytest.raises(SpecError, match=r"unknown option 'requirement' of ml\.function; did you mean 'requirements'"):
        ml.function(requirement=["numpy"])(lambda x: x)


def test_one_string_for_a_list_is_refused_with_the_right_spelling() -> None:
    with pytest.raises(SpecError, match=r"requirements=\['numpy'\]"):
        ml.function(requirements="numpy")(lambda x: x)


def test_var_arguments_are_refused_at_decoration() -> None:
    with pytest.raises(SignatureError):

        @ml.function
        def anything(*rows: int) -> int:
            return 0


def test_decorating_twice_keeps_one_function() -> None:
    assert function_of(double) is double
    assert function_of(double, retries=1).target is double.target


def test_an_importable_function_is_pickled_by_its_name() -> None:
    content = pickle.dumps(double)
    assert pickle.loads(content) is double
    assert len(content) < 200
    assert copy.deepcopy(double) is double


def test_a_function_with_other_options_keeps_them_through_pickle() -> None:
    changed = double.with_options(retries=2)
    assert pickle.loads(pickle.dumps(changed)) is changed


def test_a_local_function_is_pickled_by_value_and_comes_back_as_itself() -> None:
    offset = 10

    @ml.function
    def local(x: int) -> int:
        return x + offset

    assert pickle.loads(pickle.dumps(local)) is local


def test_instances_of_a_decorated_class_can_be_pickled() -> None:
    again = pickle.loads(pickle.dumps(Model(7)))
    assert again(1) == 8
    assert isinstance(again, Model)


SCRIPT = """
    import pickle, sys
    import mlfuncs as ml

    @ml.function(retries=3)
    def fact(n: int) -> int:
        return n * fact(n - 1) if n else 1

    @ml.function
    def even(n: int) -> bool:
        return n == 0 or odd(n - 1)

    @ml.function
    def odd(n: int) -> bool:
        return n != 0 and even(n - 1)

    @ml.function
    class Model:
        def __init__(self, offset): self.offset = offset
        def __call__(self, x: int) -> int: return x + self.offset

    if __name__ == "__main__":
        import {pickler} as pickler
        values = [fact, even, fact.with_options(retries=5), Model(4)]
        assert pickle.loads(pickler.dumps(values))[0] is fact
        open(sys.argv[1], "wb").write(pickler.dumps(values))
"""


@pytest.mark.parametrize("pickler", ["pickle", "cloudpickle"])
def test_functions_of_a_script_can_be_read_in_another_process(pickler: str, tmp_path) -> None:
    run_script(SCRIPT.format(pickler=pickler), tmp_path, "out.pkl")
    reader = """
        import pickle
        fact, even, changed, model = pickle.load(open("out.pkl", "rb"))
        assert fact(5) == 120 and fact.spec.retries == 3 and changed.spec.retries == 5
        assert even(4) and not even(3)
        assert model(1) == 5
        again = pickle.loads(pickle.dumps([fact, fact]))
        assert again[0] is again[1] is fact
        print("read")
    """
    assert run_script(reader, tmp_path) == "read\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes")
def test_a_function_of_a_script_runs_in_joblib_workers(tmp_path) -> None:
    code = """
        import joblib
        import mlfuncs as ml

        @ml.function
        def square(x: int) -> int:
            return x * x

        if __name__ == "__main__":
            print(joblib.Parallel(n_jobs=2)(joblib.delayed(square)(i) for i in range(4)))
    """
    assert run_script(code, tmp_path) == "[0, 1, 4, 9]\n"


def test_a_function_object_can_be_made_without_its_parts() -> None:
    empty = Function.__new__(Function)
    with pytest.raises(AttributeError):
        _ = empty.target
