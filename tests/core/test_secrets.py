"""Secrets: where values come from, and that none is left in what is written down."""

from __future__ import annotations

import base64
import io
import itertools
import json
import traceback
import urllib.parse
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlfuncs.errors import SecretMissing, SpecError
from mlfuncs.secrets import Redactor, redact, resolve_secrets, secret
from mlfuncs.settings import Settings

KEY = "-----BEGIN KEY-----\nMIIEvQIBADANBgkqhkiG\n9w0BAQEFAASCBKcwggSj\n-----END KEY-----"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    folder = tmp_path / "secrets"
    folder.mkdir()
    return Settings(home=tmp_path / "home", project="shop", secrets_dir=str(folder))


def test_the_environment_comes_before_the_directory(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    (Path(settings.secrets_dir) / "DB_PASSWORD").write_text("from-file\n")
    monkeypatch.delenv("DB_PASSWORD", raising=False)
    assert resolve_secrets(["DB_PASSWORD"], settings) == {"DB_PASSWORD": "from-file"}
    monkeypatch.setenv("DB_PASSWORD", "from-env")
    assert resolve_secrets(["DB_PASSWORD"], settings) == {"DB_PASSWORD": "from-env"}


def test_a_kubernetes_mount_is_such_a_directory(settings: Settings) -> None:
    folder = Path(settings.secrets_dir)
    (folder / "..2024_01").mkdir()
    (folder / "..2024_01" / "API_KEY").write_text(KEY)
    (folder / "..data").symlink_to("..2024_01")
    (folder / "API_KEY").symlink_to("..data/API_KEY")
    assert resolve_secrets(["API_KEY"], settings) == {"API_KEY": KEY}


def test_a_missing_secret_says_where_it_was_looked_for(settings: Settings) -> None:
    with pytest.raises(
        SecretMissing, match=r"'NOT_SET_ANYWHERE' has no value here: set the environment variable .* file"
    ):
        resolve_secrets(["NOT_SET_ANYWHERE"], settings)


@pytest.mark.parametrize("name", ["../../etc/passwd", "a b", "", "1X"])
def test_a_secret_name_is_never_a_path(name: str, settings: Settings) -> None:
    with pytest.raises(SpecError, match="must look like DB_PASSWORD"):
        resolve_secrets([name], settings)


def test_ml_secret_reads_the_settings_that_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "TOKEN_X").write_text("value-x")
    monkeypatch.setenv("MLFUNCS_SECRETS_DIR", str(tmp_path))
    assert secret("TOKEN_X") == "value-x"


FORMS = {
    "plain": lambda v: v,
    "base64": lambda v: base64.b64encode(v.encode()).decode(),
    "base64 inside": lambda v: base64.b64encode(f"user:{v}:more".encode()).decode(),
    "base64 inside by one": lambda v: base64.b64encode(f"u:ab{v}".encode()).decode(),
    "url": lambda v: urllib.parse.quote(v, safe=""),
    "form": lambda v: urllib.parse.quote_plus(v),
    "json": lambda v: json.dumps({"password": v}),
    "repr": lambda v: repr([v]),
    "hex": lambda v: v.encode().hex(),
}


@pytest.mark.parametrize(
    "value", ["p@ss w/rd+1?", "hunter2-and-more", KEY, 'quo"te\\back'], ids=["odd", "plain", "key", "quotes"]
)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_value_is_replaced(form: str, value: str) -> None:
    written = FORMS[form](value)
    masked = redact(f"before {written} after", {"NAME": value})
    assert masked.startswith("before ") and masked.endswith(" after")
    for piece in (written, value, *[line for line in value.splitlines() if len(line) > 12]):
        assert piece not in masked
    assert "***" in masked


def test_lines_of_a_key_are_replaced_one_by_one() -> None:
    assert redact(f"x {KEY.splitlines()[1]} y", [KEY]) == "x *** y"


def test_ordinary_text_stays() -> None:
    assert redact("nothing here", ["hunter2"]) == "nothing here"
    assert redact("a b c", ["", "ab"]) == "a b c"


def test_a_traceback_is_redacted() -> None:
    try:
        raise ValueError("cannot log in with hunter2-and-more")
    except ValueError:
        text = redact(traceback.format_exc(), ["hunter2-and-more"])
    assert "hunter2" not in text and "ValueError: cannot log in with ***" in text


def written_in_pieces(text: str, cuts: list[int], values: list[str]) -> str:
    out = io.StringIO()
    stream = Redactor(values).wrap(out)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for start, end in itertools.pairwise(edges):
        stream.write(text[start:end])
        stream.flush()
    stream.close()
    return out.getvalue()


@given(st.lists(st.integers(0, 120), max_size=12), st.sampled_from(["hunter2-and-more", KEY, "aaaa", "abab"]))
def test_a_value_split_across_writes_is_replaced(cuts: list[int], value: str) -> None:
    text = f"start {value} middle {base64.b64encode(value.encode()).decode()} {value[:3]} end"
    got = written_in_pieces(text, cuts, [value])
    assert value not in got
    assert base64.b64encode(value.encode()).decode() not in got
    for line in value.splitlines():
        assert len(line) < 12 or line not in got
    assert got.startswith("start ***") and got.endswith(f"{value[:3]} end")


@given(st.text(alphabet="abc \n", max_size=60), st.lists(st.integers(0, 60), max_size=6))
def test_streams_lose_nothing(text: str, cuts: list[int]) -> None:
    assert written_in_pieces(text, cuts, ["secretvalue"]) == text
    assert "abcabc" not in written_in_pieces(text, cuts, ["abcabc"])


def test_what_cannot_be_a_value_is_written_at_once() -> None:
    out = io.StringIO()
    stream = Redactor(["hunter2"]).wrap(out)
    stream.write("epoch 1\n")
    assert out.getvalue() == "epoch 1\n"
    stream.write("x hun")
    assert out.getvalue() == "epoch 1\nx "
    stream.write("dred")
    assert out.getvalue() == "epoch 1\nx hundred"
