"""The progress bar, on a screen, in a notebook and in a log."""

import io
import os
import pty
import subprocess
import sys
import threading

import nbclient
import nbformat
import pytest

from mlfuncs.progress import PlainView, Progress, SilentView, State, progress, render_bar


class Clock:
    """Time that moves when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Recorded:
    """Keeps every state drawn."""

    interval_s = 0.1

    def __init__(self):
        self.states = []

    def draw(self, state):
        self.states.append(state)


def test_drawing_is_limited_but_the_end_is_always_drawn():
    clock, view = Clock(), Recorded()
    with Progress(State("x", 100), view, clock) as bar:
        for _ in range(100):
            clock.now += 0.01
            bar.advance()
    assert len(view.states) <= 13
    assert view.states[-1].done == 100 and view.states[-1].finished
    assert view.states[-1].elapsed_s == pytest.approx(1.0)


def test_the_end_is_drawn_when_the_block_raises():
    view = Recorded()
    with pytest.raises(ValueError), Progress(State("x", 2), view, Clock()):
        raise ValueError
    assert view.states[-1].finished and view.states[-1].done == 0


def test_a_job_that_is_not_counted_shows_no_count():
    assert State("Deploying x", None, elapsed_s=5.2).text == "Deploying x  5.2 s"
    assert State("Reading", None, done=3, elapsed_s=5.2).text == "Reading  3  5.2 s"
    assert State("Reading", 4, elapsed_s=5.2).text == "Reading  0/4  5.2 s"
    assert State("Reading", 4, elapsed_s=2e-6).text == "Reading  0/4"


def test_a_block_that_raises_does_not_say_done():
    stream = io.StringIO()
    with pytest.raises(ValueError), Progress(State("Deploying x", None), PlainView(stream), Clock()):
        raise ValueError
    assert stream.getvalue().splitlines()[-1].endswith("  failed")


def test_threads_may_advance_one_bar():
    bar = Progress(State("x", 4000), SilentView(), Clock())
    threads = [threading.Thread(target=lambda: [bar.advance() for _ in range(1000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bar.state.done == 4000


def test_plain_output_is_a_line_at_the_start_now_and_then_and_at_the_end():
    clock, stream = Clock(), io.StringIO()
    with Progress(State("Ingesting", 30), PlainView(stream), clock) as bar:
        for _ in range(30):
            clock.now += 1
            bar.advance()
            bar.update(note="best auc=0.9")
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("Ingesting  0/30")
    assert 4 <= len(lines) <= 5
    assert lines[-1].endswith("best auc=0.9  done") and "30/30" in lines[-1]
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_an_unknown_total_counts_without_a_share():
    state = State("x", None, done=5)
    assert state.fraction is None and "5" in state.text and "/" not in state.text
    assert "value=" not in render_bar(state)


def test_more_than_the_total_is_a_full_bar():
    assert State("x", 2, done=3).fraction == 1.0


def test_a_failed_job_says_so_in_a_notebook():
    assert "<code>Loading  1/2  failed</code>" in render_bar(State("Loading", 2, done=1, finished=True, failed=True))


def test_notes_are_escaped_in_a_notebook():
    assert "<b>" not in render_bar(State("<b>", 1, note="<b>"))


def test_a_disabled_bar_is_silent(capfd):
    with progress("x", total=1, enabled=False) as bar:
        bar.advance()
    assert capfd.readouterr() == ("", "")


def test_a_log_file_gets_lines_and_standard_output_nothing():
    code = "from mlfuncs.progress import progress\nwith progress('Loading', total=2) as b: b.advance(2)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "Loading  2/2" in done.stderr and "\x1b" not in done.stderr


def test_a_terminal_gets_a_moving_bar():
    code = (
        "import time\nfrom mlfuncs.progress import progress\n"
        "with progress('Loading', total=3) as b:\n"
        "    for _ in range(3): time.sleep(0.15); b.advance(); b.update(note='[x] note')\n"
    )
    outside, inside = pty.openpty()
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    child = subprocess.Popen([sys.executable, "-c", code], stderr=inside, stdout=inside, env=environ)
    os.close(inside)
    shown = b""
    try:
        while chunk := os.read(outside, 4096):
            shown += chunk
    except OSError:
        pass  # a pseudo-terminal ends with EIO
    os.close(outside)
    assert child.wait() == 0
    assert b"Loading" in shown and b"3/3" in shown and b"[x] note" in shown and b"\x1b[" in shown


def test_a_notebook_gets_one_output_updated_in_place():
    code = (
        "from mlfuncs.progress import progress\nwith progress('Loading', total=2) as b:\n    b.advance(); b.advance()"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    (output,) = notebook.cells[0].outputs
    assert output["output_type"] == "display_data"
    assert "<progress" in output["data"]["text/html"] and "2/2" in output["data"]["text/html"]
