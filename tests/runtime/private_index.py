"""A package index on this machine that asks for a password."""

import base64
import contextlib
import functools
import http.server
import subprocess
import sys
import threading

USER, PASSWORD = "index-user", "index-word-81"
CREDENTIALS = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


class Index(http.server.SimpleHTTPRequestHandler):
    """A package index below a folder; every request must name the user."""

    def do_GET(self):
        if self.headers.get("Authorization") == CREDENTIALS:
            super().do_GET()
            return
        self.send_response(401)
        self.send_header("WWW-Authenticate", "Basic")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_arguments):
        pass


@contextlib.contextmanager
def serving(address, handler, context=None):
    """A server of this handler, behind TLS when there is a `context`; its port."""
    server = http.server.ThreadingHTTPServer((address, 0), handler)
    server.daemon_threads = True
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def serving_index(folder, address="127.0.0.1", context=None):
    """`serving` of the index in `folder`/simple."""
    (folder / "simple").mkdir(parents=True)
    return serving(address, functools.partial(Index, directory=str(folder)), context)


def fill(index, lines):
    """Put the wheels of these requirements, and of all they need, into a simple index."""
    aside = index.parent / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", str(aside)]
    subprocess.run([*command, "--only-binary", ":all:", *lines], check=True, capture_output=True)
    for wheel in aside.iterdir():
        folder = index / wheel.name.partition("-")[0].lower().replace("_", "-").replace(".", "-")
        folder.mkdir(exist_ok=True)
        wheel.rename(folder / wheel.name)
