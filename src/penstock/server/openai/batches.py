"""/v1/batches: jobs of many requests. They survive a restart, run at low priority, and give way to everybody else.

Owns: the task that works on batches.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec
from starlette.types import ASGIApp

from penstock.base.errors import PenstockError, ValidationError
from penstock.messages import ErrorInfo
from penstock.messages.bounds import BACKGROUND_PRIORITY, MAX_ENTRIES
from penstock.server.body import decode_body, with_ignored
from penstock.server.exchange import Exchange
from penstock.server.inner_call import PRIORITY_KEY, InnerCall
from penstock.server.openai.files import Files
from penstock.server.openai.paging import limit_of, page, query_of
from penstock.server.state import Phase, ServerState

logger = logging.getLogger(__name__)

MAX_REQUESTS: Final = 50_000
MAX_LISTED: Final = 100
WINDOW_S: Final = 86_400.0
RETRIED: Final = frozenset({0, 429, 499, 503})  # the server's own trouble, not the request's
RETRY_S: Final = 0.25
POLL_S: Final = 0.05
# One in so many of the engine's rows is asked for at a time. How much they get beside others, the scheduler says.
ROWS_SHARE: Final = 4


class BatchRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/batches."""

    input_file_id: str
    endpoint: str
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = None
    output_expires_after: Any = None


class _Line(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    custom_id: str
    method: Literal["POST"]
    url: str
    body: msgspec.Raw


_decoder = msgspec.json.Decoder(BatchRequest)
_line_decoder = msgspec.json.Decoder(_Line)
_body_decoder = msgspec.json.Decoder(dict[str, Any])


class Batches:
    """The batches of one server. `endpoints`: what a line may ask for, by path; set when the routes are built."""

    def __init__(self, state: ServerState, files: Files, endpoints: Mapping[str, ASGIApp]) -> None:
        self._state = state
        self._files = files
        self._endpoints = endpoints
        self._task: asyncio.Task[None] | None = None
        self._calls: set[InnerCall] = set()
        self._current = ""
        self._cancelled: set[str] = set()
        state.when_closing.insert(0, self.close)  # before the store

    # Routes: each is a `call.Handler`

    async def create(self, body: bytes, _exchange: Exchange) -> object:
        request, ignored = decode_body(_decoder, body, lenient=self._state.settings.lenient)
        if request.output_expires_after is not None:
            raise ValidationError("output_expires_after is not supported.", param="output_expires_after")
        if request.endpoint not in self._endpoints:
            raise ValidationError(f"endpoint must be one of {', '.join(self._endpoints)}.", param="endpoint")
        metadata = request.metadata or {}
        longest = max((len(text) for pair in metadata.items() for text in pair), default=0)
        if len(metadata) > MAX_ENTRIES["metadata"] or longest > MAX_ENTRIES["user_chars"]:
            raise ValidationError("metadata has too many or too long entries.", param="metadata")
        store = self._files.store
        store.file(request.input_file_id)
        now_s = int(self._state.now_s())
        batch: dict[str, Any] = {
            "id": f"batch_{self._state.new_id()}",
            "object": "batch",
            "endpoint": request.endpoint,
            "input_file_id": request.input_file_id,
            "completion_window": request.completion_window,
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "errors": None,
            "created_at": now_s,
            "expires_at": now_s + int(WINDOW_S),
            "metadata": metadata,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
        }
        store.put_batch(batch["id"], batch, is_open=True)
        self.start()
        return with_ignored(batch, ignored)

    async def retrieve(self, _body: bytes, exchange: Exchange) -> object:
        return self._files.store.batch(_id_of(exchange))

    async def list_batches(self, _body: bytes, exchange: Exchange) -> object:
        query = query_of(exchange, ("after", "limit"))
        data, has_more = self._files.store.batches(query.get("after"), limit_of(query, 20, MAX_LISTED))
        return page(data, has_more=has_more)

    async def cancel(self, _body: bytes, exchange: Exchange) -> object:
        batch = self._files.store.batch(_id_of(exchange))
        if batch["status"] in ("validating", "in_progress"):
            batch |= {"status": "cancelling", "cancelling_at": int(self._state.now_s())}
            self._files.store.put_batch(batch["id"], batch, is_open=True)
            self._cancelled.add(batch["id"])
            if self._current == batch["id"]:
                for call in self._calls:
                    call.leave()
            self.start()
        return batch

    # Work

    def start(self) -> None:
        """Works on what is open, unless it does already. Called when the server can serve, and for a new batch."""
        if self._files.exists and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._work())
            self._task.add_done_callback(_report)

    def close(self) -> None:
        """Leaves the rest to the next start."""
        if self._task is not None:
            self._task.cancel()

    async def _work(self) -> None:
        while self._state.phase is not Phase.DRAINING:
            open_ids = self._files.store.open_batches()
            if not open_ids:
                return
            self._current = open_ids[0]
            try:
                await self._work_on(open_ids[0])
            except Exception as error:
                if not isinstance(error, PenstockError):
                    logger.exception("batch %s failed inside the server", open_ids[0])
                info = ErrorInfo.of(error)
                self._end(open_ids[0], "failed", errors=[{"code": info.code, "message": info.message}])
            finally:
                self._current = ""

    async def _work_on(self, batch_id: str) -> None:
        store = self._files.store
        batch = store.batch(batch_id)
        content = store.content(batch["input_file_id"])
        lines, errors = await asyncio.to_thread(parse_lines, content, batch["endpoint"])
        if errors:
            self._end(batch_id, "failed", errors=errors)
            return
        batch = store.batch(batch_id)  # it may have been cancelled meanwhile, or before a restart
        if batch["status"] == "cancelling":
            self._cancelled.add(batch_id)
        batch["request_counts"]["total"] = len(lines)
        if batch["status"] == "validating":
            batch |= {"status": "in_progress", "in_progress_at": int(self._state.now_s())}
        store.put_batch(batch_id, batch, is_open=True)
        await self._answer_all(batch_id, lines, batch["expires_at"])
        status = store.batch(batch_id)["status"]
        if status == "cancelling":
            self._end(batch_id, "cancelled")
        elif len(store.finished_lines(batch_id)) == len(lines):
            self._end(batch_id, "completed")
        elif self._state.now_s() >= batch["expires_at"]:
            self._end(batch_id, "expired")

    async def _answer_all(self, batch_id: str, lines: list[_Line], expires_at: float) -> None:
        """Answers what has no result yet, until the batch is cancelled, expires, or the server drains."""
        store = self._files.store
        finished = store.finished_lines(batch_id)
        waiting = [number for number in range(len(lines)) if number not in finished][::-1]
        tasks: set[asyncio.Task[None]] = set()
        try:
            while waiting or tasks:
                is_over = self._is_over(batch_id, expires_at)
                if is_over:
                    waiting = []
                while waiting and len(tasks) < self._room():
                    number = waiting.pop()
                    tasks.add(asyncio.create_task(self._answer(batch_id, number, lines[number])))
                if tasks:
                    done, tasks = await asyncio.wait(tasks, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()
                elif waiting:
                    await asyncio.sleep(POLL_S)
        finally:
            for task in tasks:
                task.cancel()

    def _is_over(self, batch_id: str, expires_at: float) -> bool:
        if self._state.phase is Phase.DRAINING or self._state.now_s() >= expires_at:
            return True
        return batch_id in self._cancelled

    def _room(self) -> int:
        """How many of a batch's requests may be open now."""
        engine = self._state.engine
        return max(1, engine.ready.max_num_seqs // ROWS_SHARE) if engine is not None else 0

    async def _answer(self, batch_id: str, number: int, line: _Line) -> None:
        """One line, until it has an answer that is its own."""
        while True:
            call = InnerCall(self._endpoints[line.url], line.url, bytes(line.body), {PRIORITY_KEY: BACKGROUND_PRIORITY})
            self._calls.add(call)
            try:
                await call.run()
            finally:
                self._calls.discard(call)
            if call.status not in RETRIED:
                break
            if self._state.phase is Phase.DRAINING or batch_id in self._cancelled:
                return
            await asyncio.sleep(RETRY_S)
        response = {"status_code": call.status, "request_id": f"{batch_id}-{number}", "body": msgspec.Raw(call.body)}
        result = {"id": f"{batch_id}-{number}", "custom_id": line.custom_id, "response": response, "error": None}
        self._files.store.add_result(batch_id, number, msgspec.json.encode(result), is_error=call.status != 200)

    def _end(self, batch_id: str, status: str, *, errors: list[dict[str, Any]] | None = None) -> None:
        """Puts the results into files, and closes the batch. May be repeated after a crash."""
        store, now_s = self._files.store, int(self._state.now_s())
        batch = store.batch(batch_id)
        for name, is_error in (("output", False), ("error", True)):
            data = b"".join(result + b"\n" for result in store.results(batch_id, is_error=is_error))
            if data:
                batch[f"{name}_file_id"] = self._files.add(f"{batch_id}_{name}.jsonl", "batch", data)
        batch |= {"status": status, f"{status}_at": now_s}
        if errors:
            batch["errors"] = {"object": "list", "data": errors}
        store.put_batch(batch_id, batch, is_open=False)
        store.drop_results(batch_id)
        self._cancelled.discard(batch_id)


def _report(task: asyncio.Task[None]) -> None:
    """A store that cannot be read ends the work on batches, not the server."""
    error = None if task.cancelled() else task.exception()
    if error is not None:
        logger.error("batches cannot go on: %s", error)


def parse_lines(content: bytes, endpoint: str) -> tuple[list[_Line], list[dict[str, Any]]]:
    """The requests of a file, or what is wrong with it (at most 100 entries, each naming its line)."""
    lines: list[_Line] = []
    errors: list[dict[str, Any]] = []
    seen: set[str] = set()
    for number, raw in enumerate(content.split(b"\n"), 1):
        if not raw.strip():
            continue
        problem = _check_line(raw, endpoint, seen, lines)
        if len(lines) > MAX_REQUESTS:
            problem = ("too_many_requests", f"A batch takes {MAX_REQUESTS} requests.")
        if problem is not None:
            errors.append({"code": problem[0], "message": problem[1], "line": number, "param": None})
            if len(errors) == 100 or problem[0] == "too_many_requests":
                break
    if not lines and not errors:
        errors.append({"code": "empty_file", "message": "The file has no requests.", "line": None, "param": None})
    return lines, errors


def _check_line(raw: bytes, endpoint: str, seen: set[str], lines: list[_Line]) -> tuple[str, str] | None:
    """Appends a good line; else what is wrong with it: (code, message)."""
    try:
        line, _ = decode_body(_line_decoder, raw)
        body = _body_decoder.decode(line.body)
    except (ValidationError, msgspec.MsgspecError, RecursionError, ValueError) as error:
        return "invalid_json_line", str(error)[:300]
    if line.url != endpoint:
        return "mismatched_endpoint", f"url must be {endpoint}, as the batch says."
    if line.custom_id in seen:
        return "duplicate_custom_id", f"{line.custom_id[:100]!r} occurs twice."
    if len(line.custom_id) > MAX_ENTRIES["user_chars"]:
        return "invalid_custom_id", f"custom_id is over {MAX_ENTRIES['user_chars']} characters."
    if body.get("stream"):
        return "invalid_request", "A batch cannot stream."
    seen.add(line.custom_id)
    lines.append(line)
    return None


def _id_of(exchange: Exchange) -> str:
    batch_id: str = exchange.scope["path_params"]["batch_id"]
    return batch_id
