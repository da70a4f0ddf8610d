"""kfp's control flow on the local engine: compiled by the real kfp (which reads no string annotations), really run."""

# ruff: noqa: UP014, B006 - components are written as kfp users write them

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Optional

import pytest
from kfp import dsl

from mlfuncs.errors import InvalidInput
from mlfuncs_pipelines.engine import Options
from mlfuncs_pipelines.run_log import PipelineRun

Run = Callable[..., PipelineRun]
IMAGE = f"python:{sys.version_info.major}.{sys.version_info.minor}"  # no step needs another Python


@dsl.component(base_image=IMAGE)
def add(a: int, b: int = 2) -> int:
    return a + b


@dsl.component(base_image=IMAGE)
def numbers(n: int) -> list[int]:
    return list(range(n))


@dsl.component(base_image=IMAGE)
def total(xs: list[int]) -> int:
    return sum(xs)


@dsl.component(base_image=IMAGE)
def show(value: str) -> str:
    return value


@dsl.component(base_image=IMAGE)
def as_text(value: list[list[int]]) -> str:
    import json

    return json.dumps(value)


@dsl.component(base_image=IMAGE)
def write(text: str, out: dsl.Output[dsl.Dataset]):
    with open(out.path, "w") as file:
        file.write(text)
    out.metadata["length"] = len(text)


@dsl.component(base_image=IMAGE)
def read(data: dsl.Input[dsl.Dataset]) -> str:
    with open(data.path) as file:
        return f"{file.read()}:{data.metadata['length']}"


@dsl.component(base_image=IMAGE)
def read_all(data: dsl.Input[list[dsl.Dataset]]) -> str:
    return ",".join(open(one.path).read() for one in data)


@dsl.component(base_image=IMAGE)
def fail(message: str) -> str:
    raise ValueError(message)


@dsl.component(base_image=IMAGE)
def final(status: dsl.PipelineTaskFinalStatus, path: str):
    with open(path, "w") as file:
        file.write(f"{status.state}|{status.pipeline_task_name}|{status.error_message}")


@dsl.component(base_image=IMAGE)
def touch(path: str, text: str = "x", note: str = "") -> str:
    with open(path, "a") as file:
        file.write(text)
    return text


@dsl.component(base_image=IMAGE)
def word(value: str = "it's") -> str:
    return value


@dsl.component(base_image=IMAGE)
def pairs() -> list[dict[str, int]]:
    return [{"a": 1, "b": 2}, {"a": 3, "b": 4}]


def test_if_elif_else_take_the_first_branch_that_holds(run: Run) -> None:
    @dsl.pipeline(name="branches")
    def branches(n: int, flag: bool = True, ratio: float = 0.5) -> int:
        with dsl.If(n > 10):
            big = add(a=100)
        with dsl.Elif(ratio > 0.25):
            middle = add(a=50)
        with dsl.Else():
            small = add(a=1)
        return dsl.OneOf(big.output, middle.output, small.output)

    assert run(branches, n=11).outputs == {"Output": 102}
    assert run(branches, n=1).outputs == {"Output": 52}
    assert run(branches, n=1, ratio=0.1).outputs == {"Output": 3}


def test_condition_on_a_value_with_a_quote(run: Run) -> None:
    @dsl.pipeline(name="quote")
    def quote() -> str:
        said = word()
        with dsl.If(said.output == "it's"):
            yes = show(value="yes")
        with dsl.Else():
            no = show(value="no")
        return dsl.OneOf(yes.output, no.output)

    assert run(quote).outputs == {"Output": "yes"}


def test_skipped_branch_skips_what_is_inside(run: Run) -> None:
    @dsl.pipeline(name="skipped")
    def skipped(flag: bool = False) -> int:
        with dsl.If(flag == True):  # noqa: E712 - kfp overloads ==
            add(a=1)
        return add(a=5).output

    done = run(skipped)
    assert done.status == "succeeded" and done.outputs == {"Output": 7}
    assert done.steps["condition-1"].status == "skipped"
    assert "condition-1/add" not in done.steps


def test_loop_over_a_step_output_is_collected_in_order(run: Run) -> None:
    @dsl.pipeline(name="loop")
    def loop(n: int = 5) -> int:
        with dsl.ParallelFor(numbers(n=n).output, parallelism=2) as item:
            one = add(a=item)
        return total(xs=dsl.Collected(one.output)).output

    assert run(loop).outputs == {"Output": 20}


def test_loop_over_nothing_collects_nothing(run: Run) -> None:
    @dsl.pipeline(name="empty")
    def empty() -> int:
        with dsl.ParallelFor(numbers(n=0).output) as item:
            one = add(a=item)
        return total(xs=dsl.Collected(one.output)).output

    assert run(empty).outputs == {"Output": 0}


def test_nested_loops_collect_lists_of_lists(run: Run) -> None:
    @dsl.pipeline(name="nested")
    def nested() -> str:
        with dsl.ParallelFor([1, 2]), dsl.ParallelFor([3, 4]) as inner:
            one = add(a=inner, b=0)
        return as_text(value=dsl.Collected(one.output)).output

    assert run(nested).outputs == {"Output": "[[3, 4], [3, 4]]"}


def test_loop_items_have_parts(run: Run) -> None:
    @dsl.pipeline(name="parts")
    def parts() -> NamedTuple("Sums", [("static", int), ("dynamic", int)]):
        with dsl.ParallelFor([{"a": 10, "b": 1}, {"a": 20, "b": 2}]) as item:
            one = add(a=item.a, b=item.b)
        with dsl.ParallelFor(pairs().output) as item:
            two = add(a=item.a, b=item.b)
        first, second = total(xs=dsl.Collected(one.output)), total(xs=dsl.Collected(two.output))
        return NamedTuple("Sums", [("static", int), ("dynamic", int)])(first.output, second.output)

    assert run(parts).outputs == {"static": 33, "dynamic": 10}


def test_condition_on_a_loop_item(run: Run) -> None:
    @dsl.pipeline(name="item-condition")
    def item_condition() -> int:
        with dsl.ParallelFor([1, 2, 3]) as item:
            with dsl.If(item > 1):
                big = add(a=item, b=100)
            with dsl.Else():
                small = add(a=item, b=0)
            one = add(a=dsl.OneOf(big.output, small.output), b=0)
        return total(xs=dsl.Collected(one.output)).output

    assert run(item_condition).outputs == {"Output": 1 + 102 + 103}


def test_artifacts_of_a_loop_are_collected_and_looped_over(run: Run) -> None:
    @dsl.pipeline(name="artifacts")
    def artifacts() -> str:
        with dsl.ParallelFor(["a", "b", "c"]) as item:
            made = write(text=item)
        return read_all(data=dsl.Collected(made.outputs["out"])).output

    assert run(artifacts).outputs == {"Output": "a,b,c"}


def test_artifact_carries_its_metadata(run: Run) -> None:
    @dsl.pipeline(name="metadata")
    def metadata() -> NamedTuple("Out", [("text", str), ("data", dsl.Dataset)]):
        made = write(text="hello")
        out = NamedTuple("Out", [("text", str), ("data", dsl.Dataset)])
        return out(read(data=made.outputs["out"]).output, made.outputs["out"])

    outputs = run(metadata).outputs
    assert outputs["text"] == "hello:5"
    assert outputs["data"]["metadata"] == {"length": 5} and Path(outputs["data"]["uri"]).read_text() == "hello"


def test_nested_pipeline_with_optional_input(run: Run) -> None:
    @dsl.component(base_image=IMAGE)
    def maybe(value: Optional[str] = None) -> str:  # noqa: UP045
        return f"got {value}"

    @dsl.pipeline(name="inner")
    def inner(value: Optional[str] = None, n: int = 3) -> str:  # noqa: UP045
        add(a=n)
        return maybe(value=value).output

    @dsl.pipeline(name="outer")
    def outer(value: Optional[str] = None) -> NamedTuple("Out", [("given", str), ("absent", str)]):  # noqa: UP045
        out = NamedTuple("Out", [("given", str), ("absent", str)])
        return out(inner(value="x").output, inner(value=value).output)

    assert run(outer).outputs == {"given": "got x", "absent": "got None"}


def test_failure_skips_what_depends_on_it_and_nothing_else(run: Run, tmp_path: Path) -> None:
    @dsl.pipeline(name="partial")
    def partial(path: str):
        bad = fail(message="no luck")
        show(value=bad.output)
        other = touch(path=path, text="1")
        touch(path=path, text="2", note=other.output)

    done = run(partial, path=str(tmp_path / "log"))
    assert done.status == "failed"
    assert "fail" in done.error and "no luck" in done.error
    assert done.steps["fail"].status == "failed" and "raise ValueError(message)" in done.steps["fail"].traceback
    assert done.steps["show"].status == "upstream_failed"
    assert (tmp_path / "log").read_text() == "12"


def test_exit_task_runs_after_a_failure_and_knows_it(run: Run, tmp_path: Path) -> None:
    @dsl.pipeline(name="exit")
    def with_exit(path: str, message: str):
        with dsl.ExitHandler(final(path=path)):
            fail(message=message)

    done = run(with_exit, path=str(tmp_path / "status"), message="boom")
    state, task, message = (tmp_path / "status").read_text().split("|")
    assert done.status == "failed"
    assert (state, task) == ("FAILED", "exit-handler-1") and "boom" in message


def test_exit_task_runs_after_success(run: Run, tmp_path: Path) -> None:
    @dsl.pipeline(name="exit-ok")
    def with_exit(path: str):
        with dsl.ExitHandler(final(path=path)):
            add(a=1)

    assert run(with_exit, path=str(tmp_path / "status")).status == "succeeded"
    assert (tmp_path / "status").read_text() == "SUCCEEDED|exit-handler-1|None"


def test_task_that_ignores_upstream_failure_gets_its_default(run: Run) -> None:
    @dsl.pipeline(name="ignore")
    def ignore():
        bad = fail(message="x")
        word(value=bad.output).ignore_upstream_failure()

    done = run(ignore)
    assert done.steps["word"].outputs.parameters == {"Output": "it's"}
    assert done.status == "failed"  # a failed step is never hidden


def test_retry_runs_a_failed_step_again_with_back_off(run: Run, tmp_path: Path) -> None:
    @dsl.component(base_image=IMAGE)
    def flaky(path: str) -> int:
        import os

        with open(path, "a") as file:
            file.write("x")
        if os.path.getsize(path) < 3:
            raise RuntimeError("not yet")
        return os.path.getsize(path)

    @dsl.pipeline(name="retry")
    def retry(path: str) -> int:
        return flaky(path=path).set_retry(3, backoff_duration="0s").output

    done = run(retry, path=str(tmp_path / "tries"))
    assert done.outputs == {"Output": 3} and done.steps["flaky"].attempt == 2


def test_retry_of_a_nested_pipeline_runs_all_of_it_again(run: Run, tmp_path: Path) -> None:
    @dsl.component(base_image=IMAGE)
    def flaky(path: str, note: str) -> int:
        import os

        if os.path.getsize(path) < 2:
            raise RuntimeError("not yet")
        return os.path.getsize(path)

    @dsl.pipeline(name="inner")
    def inner(path: str) -> int:
        first = touch(path=path).set_caching_options(False)
        return flaky(path=path, note=first.output).output

    @dsl.pipeline(name="outer")
    def outer(path: str) -> int:
        return inner(path=path).set_retry(2, backoff_duration="0s").output

    assert run(outer, path=str(tmp_path / "tries")).outputs == {"Output": 2}


def test_importer_passes_uri_type_and_metadata(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_text("weights")

    @dsl.component(base_image=IMAGE)
    def use(model: dsl.Input[dsl.Model]) -> str:
        return f"{type(model).__name__}:{open(model.path).read()}:{model.metadata['n'] + 1}:{model.metadata['tag']}"

    @dsl.pipeline(name="import")
    def imported(uri: str, n: int = 4) -> str:
        model = dsl.importer(
            artifact_uri=uri, artifact_class=dsl.Model, reimport=True, metadata={"n": n, "tag": f"v{n}"}
        )
        return use(model=model.output).output

    assert run(imported, uri=str(tmp_path / "model.txt")).outputs == {"Output": "Model:weights:5:v4"}


def test_custom_path_of_an_artifact_reaches_the_next_step(run: Run) -> None:
    @dsl.component(base_image=IMAGE)
    def custom(out: dsl.Output[dsl.Dataset]):
        import tempfile

        path = tempfile.mkdtemp() + "/elsewhere.txt"
        with open(path, "w") as file:
            file.write("moved")
        out.metadata["length"] = 5
        out.custom_path = path

    @dsl.pipeline(name="custom")
    def custom_path() -> str:
        return read(data=custom().outputs["out"]).output

    assert run(custom_path).outputs == {"Output": "moved:5"}


def test_workspace_is_shared_by_the_steps_of_one_run(run: Run) -> None:
    @dsl.component(base_image=IMAGE)
    def put(folder: str) -> str:
        with open(folder + "/shared.txt", "w") as file:
            file.write("hi")
        return folder

    @dsl.component(base_image=IMAGE)
    def get(folder: str) -> str:
        return open(folder + "/shared.txt").read()

    config = dsl.PipelineConfig(workspace=dsl.WorkspaceConfig(size="1Gi"))

    @dsl.pipeline(name="workspace", pipeline_config=config)
    def workspace() -> str:
        first = put(folder=dsl.WORKSPACE_PATH_PLACEHOLDER)
        return get(folder=dsl.WORKSPACE_PATH_PLACEHOLDER).after(first).output

    first, second = run(workspace), run(workspace)
    assert first.outputs == second.outputs == {"Output": "hi"}
    assert not second.steps["put"].cached  # no key can hold what is in a shared folder


def test_environment_variables_and_placeholders_reach_the_step(run: Run) -> None:
    @dsl.component(base_image=IMAGE)
    def environment(note: str) -> str:
        import os

        return f"{os.environ['COLOUR']}|{note}"

    @dsl.pipeline(name="env")
    def env(name: str = "n") -> str:
        task = environment(note=f"{name}/{dsl.PIPELINE_TASK_NAME_PLACEHOLDER}/{dsl.PIPELINE_JOB_NAME_PLACEHOLDER}")
        return task.set_env_variable("COLOUR", "red").set_cpu_limit("1").output

    done = run(env)
    assert done.outputs["Output"] == f"red|n/environment/{done.id}"
    assert done.steps["environment"].resources["resourceCpuLimit"] == "1"


def test_container_commands_get_their_placeholders(run: Run) -> None:
    @dsl.container_component
    def container(text: str, out: dsl.OutputPath(str), made: dsl.Output[dsl.Dataset], more: Optional[str] = None):  # noqa: UP045
        return dsl.ContainerSpec(
            image="alpine",
            command=["sh", "-c", 'printf "%s" "$*" > "$0"; printf d > "$1"', out, made.path],
            args=[
                dsl.ConcatPlaceholder(["<", text, ">"]),
                dsl.IfPresentPlaceholder(input_name="more", then=["--more", more], else_=["--none"]),
            ],
        )

    @dsl.pipeline(name="container")
    def containers() -> NamedTuple("Out", [("one", str), ("two", str)]):
        out = NamedTuple("Out", [("one", str), ("two", str)])
        return out(container(text="a b").outputs["out"], container(text="c", more="d").outputs["out"])

    outputs = run(containers, Options(containers="process")).outputs
    assert outputs["one"].endswith("<a b> --none") and outputs["two"].endswith("<c> --more d")


def test_wrong_parameters_are_refused_before_anything_runs(run: Run, settings: Any) -> None:
    @dsl.pipeline(name="typed")
    def typed(n: int) -> int:
        return add(a=n).output

    for bad in ({"n": "many"}, {}, {"n": 1, "m": 2}):
        with pytest.raises(InvalidInput):
            run(typed, **bad)
    assert not list((settings.home / "pipelines").glob("runs/*/steps"))


def test_integers_stay_integers_inside_lists_and_dicts(run: Run) -> None:
    @dsl.component(base_image=IMAGE)
    def describe(values: list[int], options: dict[str, Any], big: int) -> str:
        import json

        return json.dumps([values, options, big])

    @dsl.pipeline(name="ints")
    def ints(
        values: list[int] = [1, 2], options: dict[str, Any] = {"n": 3, "r": 0.5, "deep": [4]}, big: int = 5
    ) -> str:
        return describe(values=values, options=options, big=big).output

    expected = [[1, 2], {"n": 3, "r": 0.5, "deep": [4]}, 5]
    assert json.loads(run(ints).outputs["Output"]) == expected
    assert "1.0" not in run(ints).outputs["Output"]
    big = 2**53 + 1
    assert json.loads(run(ints, big=big, values=[big]).outputs["Output"])[0] == [big]


def test_independent_steps_run_at_the_same_time(run: Run, tmp_path: Path) -> None:
    @dsl.component(base_image=IMAGE)
    def meet(folder: str, me: str, other: str) -> str:
        import os
        import time

        open(os.path.join(folder, me), "w").close()
        deadline = time.time() + 60
        while not os.path.exists(os.path.join(folder, other)):
            if time.time() > deadline:
                raise TimeoutError("the other step never started")
            time.sleep(0.01)
        return me

    @dsl.pipeline(name="parallel")
    def parallel(folder: str):
        meet(folder=folder, me="a", other="b")
        meet(folder=folder, me="b", other="a")

    assert run(parallel, folder=str(tmp_path)).status == "succeeded"


def test_more_than_two_iterations_of_a_loop_run_at_once(run: Run, tmp_path: Path) -> None:
    @dsl.component(base_image=IMAGE)
    def gather(folder: str, me: int, all_of: int) -> int:
        import os
        import time

        open(os.path.join(folder, str(me)), "w").close()
        deadline = time.time() + 60
        while len(os.listdir(folder)) < all_of:
            if time.time() > deadline:
                raise TimeoutError("the others never started")
            time.sleep(0.01)
        return me

    @dsl.pipeline(name="wide")
    def wide(folder: str):
        with dsl.ParallelFor([1, 2, 3, 4]) as item:
            gather(folder=folder, me=item, all_of=4)

    (tmp_path / "folder").mkdir()
    assert run(wide, Options(parallel=4), folder=str(tmp_path / "folder")).status == "succeeded"


def test_parallelism_limits_a_loop(run: Run, tmp_path: Path) -> None:
    @dsl.component(base_image=IMAGE)
    def alone(folder: str, me: int) -> int:
        import os
        import time

        lock = os.path.join(folder, "lock")
        os.close(os.open(lock, os.O_CREAT | os.O_EXCL))  # fails when another iteration is at it
        time.sleep(0.05)
        os.unlink(lock)
        return me

    @dsl.pipeline(name="narrow")
    def narrow(folder: str):
        with dsl.ParallelFor([1, 2, 3], parallelism=1) as item:
            alone(folder=folder, me=item)

    assert run(narrow, folder=str(tmp_path)).status == "succeeded"


@pytest.mark.slow
def test_kfp_local_gives_the_same_where_it_is_right(run: Run, tmp_path: Path) -> None:
    from kfp import local

    @dsl.pipeline(name="same")
    def same(n: int = 3) -> NamedTuple("Out", [("sum", int), ("text", str)]):
        data = write(text="abc")
        with dsl.If(n > 2):
            big = add(a=n)
        with dsl.Else():
            small = add(a=0)
        out = NamedTuple("Out", [("sum", int), ("text", str)])
        return out(dsl.OneOf(big.output, small.output), read(data=data.outputs["out"]).output)

    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "kfp"))
    theirs = same(n=3).outputs
    ours = run(same, n=3).outputs
    assert ours == {"sum": 5, "text": "abc:3"}
    assert theirs == {"sum": 5, "text": "abc:3.0"}  # its metadata turns integers into floats; the backend's do not
