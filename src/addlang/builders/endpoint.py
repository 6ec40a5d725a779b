"""Any endpoint that speaks OpenAI's chat completions: a hosted service, vLLM, llama.cpp, Ollama.

Requests run side by side. What may pass is tried again with growing pauses (no connection, no answer in time, 408, 409, 425,
429 and 5xx, a reply that is no JSON), and a ``Retry-After`` holds for all of them. What will not pass (a wrong key, an
unknown model) ends the job. A request that the server refuses as such (400, 413, 422) is the text's own problem.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from addlang.builders.backend import OutOfBudgetError, Reply, Request
from addlang.builders.budget import Budget
from addlang.builders.prompt import messages
from addlang.errors import AddlangError

PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
OWN_FAULT = {400, 413, 422}
LONGEST_WAIT = 600.0  # seconds; a server that asks for more is left alone until the next call of the command
LONGEST_PAUSE = 60.0
HOPELESS = 5  # refusals in a row without one answer: it is not the texts
FRAME = 100  # tokens of a chat's own frame, at most


class Endpoint:
    """A chat model behind HTTP.

    Args:
        base_url: such as ``http://localhost:8000/v1``; ``/chat/completions`` is added.
        model: name of the model there.
        prompt: system prompt, see :mod:`addlang.builders.prompt`.
        source, target: names of the languages.
        mark: example of a mark.
        api_key: sent as bearer token; never stored.
        concurrency: requests under way at once.
        timeout: seconds until an answer must have come.
        retries: further tries of a request that failed on the way.
        max_new_tokens: of a reply; None: three per byte of the text, which is enough for every script.
        body: further fields of the request; null removes one of ours, such as ``{"temperature": null}``.
        budget: caps.
        pause: seconds before the first further try.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        prompt: str,
        source: str,
        target: str,
        mark: str,
        api_key: str | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 6,
        max_new_tokens: int | None = None,
        body: Mapping[str, Any] | None = None,
        budget: Budget | None = None,
        pause: float = 1.0,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise AddlangError(f"'{base_url}' is no address", "it begins with http:// or https://")
        self.url = base_url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model, self.prompt, self.body = model, prompt, dict(body or {})
        self.languages = {"source": source, "target": target, "mark": mark}
        self.concurrency, self.timeout, self.retries, self.pause = concurrency, timeout, retries, pause
        self.max_new_tokens = max_new_tokens
        self.budget = budget or Budget()
        self._key = api_key
        self._local = threading.local()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._not_before = 0.0
        self._answered = self._refused = 0

    @property
    def identity(self) -> dict[str, Any]:
        """Not the address: the same model may be served elsewhere tomorrow."""
        return {"kind": "endpoint", "model": self.model, "prompt": self.prompt, **self.languages, "body": self.body}

    def run(
        self, next_request: Callable[[], Request | None], keep: Callable[[Reply], None]
    ) -> Iterator[tuple[Request, Reply]]:
        """See :class:`addlang.builders.backend.Backend`."""
        self._stop.clear()
        under_way: dict[Future[Reply], tuple[Request, tuple[int, int]]] = {}
        held: Request | None = None
        failure: AddlangError | None = None
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                while True:
                    while failure is None and len(under_way) < self.concurrency:
                        request, held = held or next_request(), None
                        if request is None:
                            break
                        most = self._most(request)
                        if not self.budget.reserve(*most):
                            held = request
                            if not under_way:
                                raise OutOfBudgetError(
                                    "the cap is reached", "run the command again with a higher one to go on"
                                )
                            break
                        under_way[pool.submit(self._answer, request, keep)] = (request, most)
                    if not under_way:
                        if failure is not None:
                            raise failure
                        return
                    for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                        request, most = under_way.pop(future)
                        self.budget.release(*most)
                        try:
                            reply = future.result()
                        except AddlangError as error:
                            failure = failure or error
                            self._stop.set()
                            continue
                        yield request, reply
            finally:
                self._stop.set()

    def _payload(self, request: Request) -> dict[str, Any]:
        payload: dict[str, Any] = {
            "model": self.model,
            "messages": messages(request, self.prompt, **self.languages),
            "temperature": 0.0 if request.attempt == 0 else min(1.0, 0.3 * request.attempt),
            "max_tokens": self._most(request)[1],
            **self.body,
        }
        return {key: value for key, value in payload.items() if value is not None}

    def _most(self, request: Request) -> tuple[int, int]:
        """Tokens in and out that a request can cost at most: no tokenizer has more of them than there are bytes."""
        asked = messages(request, self.prompt, **self.languages)
        size = len(request.text.encode())
        return (
            sum(len(m["content"].encode()) for m in asked) + FRAME,
            self.max_new_tokens or max(256, 3 * size),
        )

    def _answer(self, request: Request, keep: Callable[[Reply], None]) -> Reply:
        """One reply, kept; tries again what may pass."""
        import requests

        payload = self._payload(request)
        problem = ""
        for number in range(self.retries + 1):
            self._wait(0.0 if number == 0 else min(LONGEST_PAUSE, self.pause * 2 ** (number - 1)))
            try:
                response = self._session().post(
                    self.url, json=payload, timeout=(min(30.0, self.timeout), self.timeout), allow_redirects=False
                )
            except requests.Timeout:
                problem = f"no answer within {self.timeout:g} s"
                continue
            except requests.RequestException as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if response.status_code in PASSING:
                problem = f"status {response.status_code}: {_message(response)}"
                self._heed(response)
                continue
            if response.status_code in OWN_FAULT:
                problem = f"refused by the server: {_message(response)}"
                self._count_refusal(problem)
                reply = Reply(request.key, request.attempt, None, problem, final=True)
                keep(reply)
                return reply
            if response.status_code != 200:
                raise self._fatal(response)
            found = self._read(request, payload, response)
            if found is None:
                problem = f"the reply cannot be read: {response.text[:200]!r}"
                continue
            with self._lock:
                self._answered += 1
            keep(found)
            return found
        raise AddlangError(
            f"{self.url} failed {self.retries + 1} times in a row ({problem})",
            "see to the server, or raise --timeout or --retries; run the same command again to go on",
        )

    def _read(self, request: Request, payload: Mapping[str, Any], response: Any) -> Reply | None:
        """The reply in a response; None if it is torn or holds something else."""
        try:
            data = json.loads(response.content)
            choice = data["choices"][0]
            text, finish = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, KeyError, IndexError, TypeError):
            return None
        usage = data.get("usage")
        counts = [usage.get(k) if isinstance(usage, dict) else None for k in ("prompt_tokens", "completion_tokens")]
        known = [n for n in counts if type(n) is int and n >= 0]  # a negative number would lift the cap
        given = text if isinstance(text, str) else ""
        said = given.encode("utf-8", "replace").decode()  # half of a surrogate pair fits into no file
        guess = (sum(len(m["content"].encode()) for m in payload["messages"]) // 4, len(said.encode()) // 4)
        tokens_in, tokens_out = known if len(known) == 2 else guess
        problem = None
        if finish == "length":
            problem = f"cut off after {tokens_out} tokens"
        elif finish == "content_filter":
            problem = "withheld by the server's filter"
        elif not said.strip():
            problem = "empty"
        elif said != given:
            problem = "half a character in it"
        return Reply(
            request.key,
            request.attempt,
            said,
            problem,
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            estimated=len(known) < 2,
        )

    def _session(self) -> Any:
        """One connection per thread."""
        import requests

        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            if self._key:
                self._local.session.headers["Authorization"] = f"Bearer {self._key}"
        return self._local.session

    def _wait(self, pause: float) -> None:
        """Sleep until this request, and any request, may be sent."""
        until = time.monotonic() + pause * random.uniform(0.5, 1.0)
        while True:
            with self._lock:
                left = max(until, self._not_before) - time.monotonic()
            if self._stop.wait(max(0.0, min(left, 0.2))) or self._stop.is_set():
                raise AddlangError("stopped")
            if left <= 0:
                return

    def _heed(self, response: Any) -> None:
        """``Retry-After``, in seconds or as a date, for all requests."""
        given = response.headers.get("Retry-After")
        if not given:
            return
        try:
            seconds = float(given)
        except ValueError:
            try:
                seconds = (parsedate_to_datetime(given) - datetime.now(UTC)).total_seconds()
            except (ValueError, TypeError):
                return
        if seconds > LONGEST_WAIT:
            raise AddlangError(
                f"{self.url} asks to wait {seconds:.0f} s",
                "run the same command again then; it goes on where it stopped",
            )
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + max(0.0, seconds))

    def _count_refusal(self, problem: str) -> None:
        with self._lock:
            self._refused += 1
            hopeless = self._answered == 0 and self._refused >= HOPELESS
        if hopeless:
            raise AddlangError(
                f"{self.url} refused the first {HOPELESS} requests ({problem})",
                "fields of the request can be changed or removed with --body, such as '{\"max_tokens\": null}'",
            )

    def _fatal(self, response: Any) -> AddlangError:
        status, said = response.status_code, _message(response)
        if status in (401, 403):
            return AddlangError(
                f"{self.url} refuses access ({status}: {said})", "name the variable that holds the key: --api_key_env"
            )
        if status == 404:
            return AddlangError(
                f"{self.url}: not found ({said})", f"check --base_url and that the model '{self.model}' is served there"
            )
        if 300 <= status < 400:
            return AddlangError(f"{self.url} is moved to {response.headers.get('Location')}", "give that as --base_url")
        return AddlangError(f"{self.url} answers with status {status}: {said}")


def _message(response: Any) -> str:
    """What a server says about an error, shortened."""
    text = response.text
    try:
        data = json.loads(text)
        error = data.get("error", data) if isinstance(data, dict) else data
        text = str(error.get("message", error)) if isinstance(error, dict) else str(error)
    except ValueError:  # no JSON: what it said as it is
        pass
    return " ".join(text.split())[:200] or "no message"
