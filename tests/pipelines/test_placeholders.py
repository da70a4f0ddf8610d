"""kfp's placeholders in commands and constants."""

from __future__ import annotations

import json

import pytest

from mlfuncs.errors import InvalidInput, SpecError
from mlfuncs_pipelines.placeholders import Context, local_path, mentions, resolve_command, resolve_text, resolve_value
from mlfuncs_pipelines.values import coerce, from_file

GIVEN = Context(
    {
        "inputs": {
            "parameterValues": {"n": 3, "s": "it's", "xs": [1, {"a": 2}], "none": None},
            "artifacts": {"d": {"artifacts": [{"name": "d", "uri": "gs://b/d", "metadata": {"k": 1}}]}},
        },
        "outputs": {
            "parameters": {"out": {"outputFile": "/o/out"}},
            "artifacts": {"m": {"artifacts": [{"name": "m", "uri": "/o/m", "metadata": {}}]}},
            "outputFile": "/o/executor_output.json",
        },
    },
    {"pipeline_job_name": "job-1", "workspace_path": "/ws"},
)


@pytest.mark.parametrize(
    ("text", "resolved"),
    [
        ("{{$.inputs.parameters['s']}}!", "it's!"),
        ("{{$.inputs.parameters['n']}}", "3"),
        ("{{$.inputs.parameters['xs']}}", '[1, {"a": 2}]'),
        ("{{$.inputs.parameters['none']}}", "null"),
        ("{{$.inputs.artifacts['d'].uri}}", "gs://b/d"),
        ("{{$.inputs.artifacts['d'].path}}", "/gcs/b/d"),
        ("{{$.inputs.artifacts['d'].metadata['k']}}", "1"),
        ("{{$.outputs.parameters['out'].output_file}}", "/o/out"),
        ("{{$.outputs.artifacts['m'].path}}", "/o/m"),
        ("{{$.outputs.output_file}}", "/o/executor_output.json"),
        ("run {{$.pipeline_job_name}}", "run job-1"),
        ("{{$.workspace_path}}/x and /kfp-workspace/y", "/ws/x and /ws/y"),
        ("{{$.some_day}}", "{{$.some_day}}"),
    ],
)
def test_placeholder_becomes_its_value(text: str, resolved: str) -> None:
    assert resolve_text(text, GIVEN) == resolved


def test_a_list_of_artifacts_is_its_json_even_with_one_in_it() -> None:
    one = {"name": "d", "uri": "/a/d"}
    given = {"inputs": {"artifacts": {"ds": {"artifacts": [one]}, "d": {"artifacts": [one]}}}}
    context = Context(given, lists=frozenset({"ds"}))
    assert json.loads(resolve_text("{{$.inputs.artifacts['ds']}}", context)) == [one]
    assert json.loads(resolve_text("{{$.inputs.artifacts['d']}}", context)) == one
    assert resolve_text("{{$.inputs.artifacts['ds'].uri}}", context) == "/a/d"


def test_whole_executor_input_is_json() -> None:
    assert json.loads(resolve_text("{{$}}", GIVEN)) == GIVEN.executor_input


def test_concat_and_if_present_nest() -> None:
    command = [
        '{"Concat": ["a-", "{{$.inputs.parameters[\'n\']}}", {"IfPresent": {"InputName": "s", "Then": "-yes"}}]}',
        '{"IfPresent": {"InputName": "s", "Then": ["--s", "{{$.inputs.parameters[\'s\']}}"], "Else": ["no"]}}',
        '{"IfPresent": {"InputName": "none", "Then": ["--never"]}}',
        '{"IfPresent": {"InputName": "d", "Then": ["--d", {"Concat": ["x", "y"]}]}}',
    ]
    assert resolve_command(command, GIVEN) == ["a-3-yes", "--s", "it's", "--d", "xy"]


def test_a_value_that_looks_like_a_placeholder_is_not_expanded_again() -> None:
    given = Context({"inputs": {"parameterValues": {"a": "{{$.inputs.parameters['b']}}", "b": "secret"}}})
    assert resolve_text("{{$.inputs.parameters['a']}}", given) == "{{$.inputs.parameters['b']}}"


def test_string_that_is_one_placeholder_keeps_the_type() -> None:
    body = {"k": "{{$.inputs.parameters['n']}}", "t": "n={{$.inputs.parameters['n']}}"}
    assert resolve_value(body, GIVEN) == {"k": 3, "t": "n=3"}


def test_json_escape_is_refused_by_name() -> None:
    with pytest.raises(SpecError, match="json_escape"):
        resolve_text("{{$.json_escape[1]}}", GIVEN)


def test_mentions_finds_inputs_and_outputs() -> None:
    assert mentions('{"IfPresent": {"InputName": "o", "Then": "{{$.outputs.artifacts[\'m\'].path}}"}}') == [
        ("outputs", "artifacts", "m"),
        ("inputs", "any", "o"),
    ]


def test_local_paths_of_uris() -> None:
    assert [local_path(uri) for uri in ("/a", "file:///a", "s3://b/k", "https://x")] == [
        "/a",
        "/a",
        "/s3/b/k",
        "https://x",
    ]


@pytest.mark.parametrize(
    ("value", "kind", "made"),
    [
        (3.0, "NUMBER_INTEGER", 3),
        ("7", "NUMBER_INTEGER", 7),
        (2**53 + 1, "NUMBER_INTEGER", 2**53 + 1),
        (3, "NUMBER_DOUBLE", 3.0),
        ("True", "BOOLEAN", True),
        ([1, 2.0], "LIST", [1, 2.0]),
        ("[1]", "LIST", [1]),
        ({"a": 1}, "STRUCT", {"a": 1}),
        (True, "STRING", "true"),
        ([1], "STRING", "[1]"),
        ("007", "STRING", "007"),
        (None, "NUMBER_INTEGER", None),
    ],
)
def test_values_take_their_declared_type(value: object, kind: str, made: object) -> None:
    result = coerce(value, kind, "x")
    assert result == made and type(result) is type(made)


@pytest.mark.parametrize(
    ("value", "kind"),
    [(3.5, "NUMBER_INTEGER"), ("x", "NUMBER_DOUBLE"), (True, "NUMBER_INTEGER"), (1, "BOOLEAN"), ({"a": 1}, "LIST")],
)
def test_values_that_cannot_fit_are_refused_by_name(value: object, kind: str) -> None:
    with pytest.raises(InvalidInput, match=f"days must be .*{kind}"):
        coerce(value, kind, "days")


def test_whole_numbers_of_a_file_are_ints_inside_lists_and_structs() -> None:
    made = from_file({"layers": [64.0, 2.5], "n": 1.0, "deep": [[3.0]]})
    assert json.dumps(made) == '{"layers": [64, 2.5], "n": 1, "deep": [[3]]}'
