"""Decorated functions that the tests use as steps."""

from __future__ import annotations

import dataclasses
import datetime
import enum
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression

import mlfuncs as ml


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Config:
    c: float = 1.0
    names: list[str] = dataclasses.field(default_factory=list)


class Split(NamedTuple):
    train: pd.DataFrame
    test: pd.DataFrame
    rows: int


def _label(frame: pd.DataFrame) -> pd.Series:
    return (frame["a"] + frame["b"] > 0).astype(int)


@ml.function
def load(n: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.normal(size=n), "b": rng.normal(size=n)})
    return frame.assign(y=_label(frame))


@ml.function
def split(data: pd.DataFrame, fraction: float = 0.5) -> Split:
    cut = int(len(data) * fraction)
    return Split(data[:cut], data[cut:], len(data))


@ml.function
def train(data: pd.DataFrame, config: Config) -> LogisticRegression:
    return LogisticRegression(C=config.c).fit(data[["a", "b"]], data["y"])


@ml.function
def evaluate(model: LogisticRegression, data: pd.DataFrame) -> ml.ClassificationMetrics:
    score = model.predict_proba(data[["a", "b"]])[:, 1]
    return ml.ClassificationMetrics.from_predictions(data["y"], score)


@ml.function
def area(metrics: ml.ClassificationMetrics) -> float:
    assert metrics.auc is not None
    return metrics.auc


@ml.function
def best(scores: list[float]) -> int:
    return int(np.argmax(scores))


@ml.function
def add(a: int, b: int = 2) -> int:
    return a + b


@ml.function
def half(x: float) -> float:
    return x / 2


@ml.function
def describe(
    color: Color,
    day: datetime.date,
    config: Config,
    mode: Literal["fast", "slow"] = "fast",
    either: int | str = 3,
    note: str | None = None,
    tags: dict[str, int] | None = None,
) -> str:
    assert isinstance(color, Color) and isinstance(day, datetime.date) and isinstance(config, Config)
    return f"{color.name}|{day.isoformat()}|{config.c}{config.names}|{mode}|{either!r}|{note}|{tags}"


@ml.function
def tomorrow(day: datetime.datetime) -> datetime.datetime:
    return day + datetime.timedelta(days=1)


@ml.function
def configure(c: float) -> Config:
    return Config(c, ["x"])


@ml.function
def anything(value):
    return {"got": value, "kind": type(value).__name__}


@ml.function
def write_file(text: str) -> Path:
    path = Path("made.csv").absolute() if False else Path(__import__("tempfile").mkdtemp()) / "made.csv"
    path.write_text(text)
    return path


@ml.function
def read_file(path: Path) -> str:
    return f"{path.name}:{path.read_text()}"


@ml.function
def count(frames: list[pd.DataFrame]) -> int:
    return sum(len(frame) for frame in frames)


@ml.function
def rows(data: pd.DataFrame) -> int:
    return len(data)


@ml.function
def report(score: float) -> ml.HTML:
    return ml.HTML(f"<b>{score:.2f}</b>")


@ml.function
def notes(score: float) -> ml.Markdown:
    return ml.Markdown(f"# {score:.2f}")


@ml.function
def measure(score: float) -> ml.Metrics:
    return ml.Metrics(score=score, n=3)


@ml.function
def array(n: int) -> np.ndarray:
    return np.arange(n)


@ml.function
def touch(path: str, text: str = "x") -> str:
    with open(path, "a") as file:
        file.write(text)
    return text


@ml.function
def needs_file(path: str, value: str = "") -> str:
    return Path(path).read_text() + value


@ml.function(secrets=["PIPE_SECRET"], env={"COLOUR": "green"}, retries=1, resources=ml.Resources(cpu=1, memory="1Gi"))
def guarded(x: int) -> str:
    import os

    value = ml.secret("PIPE_SECRET")
    print("the secret is", value)
    return f"{len(value)}{os.environ['COLOUR']}{x}"


@ml.function
def logs_metric(x: int) -> int:
    ml.log_metric("loss", x / 2)
    return x


@ml.function
def untyped(x: Any) -> Any:
    return x


@ml.function
def run_another(x: int) -> int:
    @ml.pipeline
    def inner(x: int):
        return add(x).output

    return inner.run(x=x).output * 10
