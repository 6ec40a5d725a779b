"""A local OpenAI-compatible server that translates by a rule, and on demand answers slowly, wrongly or not at all."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

GERMAN = [
    "Der",
    "alte",
    "Mann",
    "liest",
    "heute",
    "Abend",
    "in",
    "der",
    "Küche",
    "die",
    "Zeitung",
    "und",
    "trinkt",
    "dabei",
    "Tee",
]
SPANISH = [
    "El",
    "hombre",
    "viejo",
    "lee",
    "esta",
    "tarde",
    "el",
    "periódico",
    "en",
    "la",
    "cocina",
    "y",
    "bebe",
    "una",
    "taza",
    "de",
    "té",
]


@dataclass
class Answer:
    """What the server does: status, headers and body, after ``stall`` seconds; ``torn``: it says more than it sends."""

    text: str | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    stall: float = 0.0
    torn: bool = False
    finish: str = "stop"
    usage: bool = True


ROWS = [
    {
        "instruction": f"Explain to the class how step number {i} of the old recipe works, please.",
        "input": "" if i % 2 else f"Run `step_{i}()` and then open https://example.org/{i} in your browser window.",
        "output": f"First heat the oven to {150 + i} °C.\n- mix the flour\n- add the water and wait for a while",
    }
    for i in range(6)
]
Job = Callable[..., dict[str, Any]]
Behaviour = Callable[[str, int, dict[str, Any]], Answer | None]  # (text, how often it was asked for before, request)


def into(words: list[str], text: str) -> str:
    """Every word replaced by one of another language; marks, line ends and punctuation stay."""
    place = 0

    def other(match: re.Match[str]) -> str:
        nonlocal place
        place += 1
        return words[(place - 1) % len(words)]

    return re.sub(r"[^\W\d_]+", other, text)


class Server:
    """Counts requests; ``behaviour`` may answer in place of the rule."""

    def __init__(self, behaviour: Behaviour | None = None) -> None:
        self.behaviour = behaviour
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = self._now = 0
        self._seen: dict[str, int] = {}
        self._lock = threading.Lock()

    def answer(self, request: dict[str, Any]) -> Answer:
        text = request["messages"][-1]["content"]
        with self._lock:
            number = self._seen.get(text, 0)
            self._seen[text] = number + 1
            self.requests.append(request)
        own = self.behaviour(text, number, request) if self.behaviour else None
        return own or Answer(into(GERMAN, text))

    @property
    def texts(self) -> list[str]:
        """What was asked for, in order."""
        return [request["messages"][-1]["content"] for request in self.requests]

    @contextlib.contextmanager
    def serving(self) -> Iterator[str]:
        """The base URL while the server runs."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.headers.append(dict(self.headers))
                with outer._lock:
                    outer._now += 1
                    outer.most_at_once = max(outer.most_at_once, outer._now)
                try:
                    self._send(outer.answer(body), body)
                finally:
                    with outer._lock:
                        outer._now -= 1

            def _send(self, answer: Answer, request: dict[str, Any]) -> None:
                if answer.stall:
                    time.sleep(answer.stall)
                data = answer.raw
                if data is None:
                    content: dict[str, Any] = {
                        "choices": [{"message": {"content": answer.text}, "finish_reason": answer.finish}]
                    }
                    if answer.usage:
                        asked = sum(len(m["content"].split()) for m in request["messages"])
                        content["usage"] = {
                            "prompt_tokens": asked,
                            "completion_tokens": len((answer.text or "").split()),
                        }
                    if answer.status != 200:
                        content = {"error": {"message": answer.text}}
                    data = json.dumps(content).encode()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.send_response(answer.status)
                    for name, value in answer.headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(data) + 100 * answer.torn))
                    self.end_headers()
                    self.wfile.write(data)
                    if answer.torn:
                        self.close_connection = True

        httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        httpd.daemon_threads = True
        thread = threading.Thread(target=lambda: httpd.serve_forever(poll_interval=0.01), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_address[1]}/v1"
        finally:
            httpd.shutdown()
            httpd.server_close()


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
