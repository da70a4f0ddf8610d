"""A small Kubernetes API server: server-side apply, lists by label, deletes, pod logs, and faults to order.

It speaks HTTP to the real client. Deployments and Knative revisions become what `behaviour` says.
"""

import contextlib
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeKubernetes:
    def __init__(self):
        self.objects, self.requests, self.faults, self.pod_logs = {}, [], {}, {}
        self.applied = []  # (path, manifest) of each apply
        self.behaviour = lambda path, manifest: None
        self.deleted = lambda path: None
        self.pod_streams = {}  # pod -> a function that yields its log, as bytes, until its end
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                fake.handle(self)

            do_GET = do_PATCH = do_DELETE = answer

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def handle(self, request):
        url = urllib.parse.urlsplit(request.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        self.requests.append((request.command, url.path, query, request.headers.get("Content-Type")))
        for (method, part), (status, message) in self.faults.items():
            if request.command == method and part in url.path:
                return self.send(request, status, {"kind": "Status", "message": message})
        pod = url.path.split("/")[-2]
        if url.path.endswith("/log") and "follow" in query and pod in self.pod_streams:
            return self.stream(request, self.pod_streams[pod]())
        status, answer = getattr(self, request.command.lower())(url.path, query, body)
        self.send(request, status, answer)

    def send(self, request, status, answer):
        content = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        request.send_response(status)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def stream(self, request, parts):
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        with contextlib.suppress(ConnectionError):  # the listener may go away
            for part in parts:
                request.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
                request.wfile.flush()
            request.wfile.write(b"0\r\n\r\n")

    def patch(self, path, query, body):
        manifest = json.loads(body)
        self.applied.append((path, json.loads(body)))
        before = self.objects.get(path)
        if query.get("dryRun"):
            return 200, manifest
        changed = before is None or before["spec" if "spec" in before else "metadata"] != manifest.get("spec")
        generation = (before["metadata"]["generation"] if before else 0) + changed
        manifest["metadata"] = {**manifest["metadata"], "generation": generation, "uid": f"uid-of-{path}"}
        self.objects[path] = manifest
        self.behaviour(path, manifest)
        return 200, manifest

    def get(self, path, query, _body):
        if path.endswith("/log"):
            return 200, self.pod_logs.get(path.split("/")[-2], "")
        if path in self.objects:
            return 200, self.objects[path]
        known = path.rpartition("/")[2]
        if not known.endswith("s"):
            return 404, {"kind": "Status", "message": f"{known} not found"}
        wanted = dict(pair.split("=") for pair in query.get("labelSelector", "").split(",") if pair)
        items = [
            value
            for key, value in list(self.objects.items())
            if key.rpartition("/")[0] == path and wanted.items() <= value["metadata"].get("labels", {}).items()
        ]
        return 200, {"items": items}

    def delete(self, path, _query, _body):
        found = self.objects.pop(path, None)
        self.deleted(path)
        return (200, found) if found else (404, {"kind": "Status", "message": "not found"})

    def names(self, kind):
        return sorted(key.rpartition("/")[2] for key in self.objects if f"/{kind}/" in key)
