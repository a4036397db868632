"""A local server that speaks the chat protocol, in the place of a vision-language model."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

KEY = "sk-local-0123456789-never-to-be-seen"


class Server(ThreadingHTTPServer):
    """Answers with ``reply(first, second)`` on base64 pictures; ``script`` overrides the next responses in turn."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.headers, self.script = [], [], []
        self.reply = lambda first, second: "tie"
        self.prompt_tokens = 1000

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        self.server.headers.append(self.headers)
        step = self.server.script.pop(0) if self.server.script else None
        if step == "hang":
            time.sleep(1.0)
            return
        if isinstance(step, int):
            self._send(step, {"error": {"message": f"refused {self.headers['Authorization']}", "type": "x"}})
        elif isinstance(step, bytes):  # instead of a completion
            self._send(200, step)
        else:  # a dict replaces parts of a completion
            changed = step if isinstance(step, dict) else {}
            self._send(200, self._completion(body, None if changed else step) | changed)

    def _completion(self, body, content):
        pictures = [p["image_url"]["url"] for p in body["messages"][0]["content"] if p["type"] == "image_url"]
        if content is None:
            content = json.dumps({"winner": self.server.reply(*pictures), "reason": "because"})
        message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
        usage = {"prompt_tokens": self.server.prompt_tokens, "completion_tokens": 100, "total_tokens": 1100}
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [message],
            "usage": usage,
        }

    def _send(self, status, payload):
        raw = isinstance(payload, bytes)
        content = payload if raw else json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if raw and payload.startswith(b"<") else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("ADDIFF_JUDGE_API_KEY", KEY)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def brighter(first, second):
    """The judge that sees: prefers the picture whose PNG is of the good method."""

    def level(url):
        import base64
        import io

        return Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).getpixel((0, 0))[0]

    return "first" if level(first) > level(second) else "second"
