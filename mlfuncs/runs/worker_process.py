"""A child interpreter that executes runs, one after another, and what the parent does with it."""

from __future__ import annotations

import codecs
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlfuncs.readiness import readable

END_OF_OUTPUT = "\0mlfuncs-end\0"  # the child prints it after a run; it is never shown
_DRAIN_S = 5.0  # how long to wait for output after the child said that a run is done
_END_S = 2.0


class ChildDied(Exception):
    """The child ended in the middle of a run; the text says how."""


class Child:
    """One child interpreter. One run at a time: `start`, then `wait` until it is True."""

    def __init__(
        self,
        python: str,
        environ: Mapping[str, str],
        show: Callable[[str], None] | None = None,
        command: Sequence[str] = (),
    ) -> None:
        answers, answer_to = os.pipe()
        command = [*(command or (python, "-P", "-m", "mlfuncs.runs.child")), str(answer_to)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(answer_to,),
                env={**environ, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # Ctrl-C reaches it through us, after we know of it
            )
        finally:
            os.close(answer_to)
        self._answers = answers
        self._show = show
        self._spoiled = False
        self._sink: Callable[[str], object] | None = None
        self._output_ended = threading.Event()
        self._pump = threading.Thread(target=self._read_output, name="mlfuncs-run-output", daemon=True)
        self._pump.start()

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def is_usable(self) -> bool:
        """Whether it may get another run: it lives, and no run in it was cut short."""
        return self._process.poll() is None and not self._spoiled

    def start(self, task: Mapping[str, Any], sink: Callable[[str], object]) -> None:
        """Give it a run; what the run prints goes to `sink`. Raises ChildDied when it is gone."""
        self._sink = sink
        self._output_ended.clear()
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(task).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as exc:
            raise ChildDied(self._how_it_ended()) from exc

    def wait(self, timeout_s: float) -> bool:
        """Whether the run is done and all it printed was read. Raises ChildDied."""
        if not readable([self._answers], timeout_s):
            return False
        if not os.read(self._answers, 4096):
            self._pump.join(_DRAIN_S)
            raise ChildDied(self._how_it_ended())
        self._output_ended.wait(_DRAIN_S)
        return True

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt in the run."""
        self._spoiled = True
        self._signal(signal.SIGINT)

    def kill(self) -> None:
        """End it and everything it started, now."""
        self._signal(signal.SIGKILL, group=True)
        self._process.wait()

    def close(self) -> None:
        """Let it go: it ends by itself, or is killed."""
        try:
            assert self._process.stdin is not None
            self._process.stdin.close()
        except OSError:
            pass  # it is gone already
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self._signal(signal.SIGKILL, group=True)  # what a run left behind
        self._pump.join(_END_S)
        if self._answers >= 0:
            os.close(self._answers)
            self._answers = -1

    def _signal(self, number: signal.Signals, group: bool = False) -> None:
        try:
            if group:
                os.killpg(self._process.pid, number)
            elif self._process.poll() is None:
                self._process.send_signal(number)
        except (ProcessLookupError, PermissionError):
            pass  # it is gone already

    def _how_it_ended(self) -> str:
        deadline = time.monotonic() + _END_S
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        code = self._process.returncode
        if code is None:
            return "it closed its channel"
        if code >= 0:
            return f"it ended with exit code {code}"
        reason = "; perhaps it ran out of memory" if -code == signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{reason}"

    def _read_output(self) -> None:
        assert self._process.stdout is not None
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        held = ""
        while chunk := os.read(self._process.stdout.fileno(), 65536):
            held += decoder.decode(chunk)
            while END_OF_OUTPUT in held:
                text, held = held.split(END_OF_OUTPUT, 1)
                self._give(text)
                self._output_ended.set()
            keep = _overlap(held)
            self._give(held[: len(held) - keep])
            held = held[len(held) - keep :]
        self._give(held)
        self._output_ended.set()

    def _give(self, text: str) -> None:
        if not text:
            return
        if self._sink is not None:
            self._sink(text)
        if self._show is not None:
            self._show(text)


def _overlap(text: str) -> int:
    """How many characters at the end of `text` may be the beginning of END_OF_OUTPUT."""
    return next((n for n in range(len(END_OF_OUTPUT) - 1, 0, -1) if text.endswith(END_OF_OUTPUT[:n])), 0)
