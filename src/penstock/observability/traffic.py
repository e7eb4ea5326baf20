"""Recorded traffic: one JSON line a request, after a header line. A superset of Mooncake's trace format.

Prompts are kept as salted hashes of their blocks, each of all that comes before it, so two prompts share leading
hashes exactly as far as they share leading blocks; without the salt, which is not written, a guessed prompt cannot be
confirmed. Contents are kept only where asked for.
Owns: the file that is being written.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from penstock.base.errors import ConfigError

TRACE_FORMAT: Final = "penstock-trace"
TRACE_VERSION: Final = 1
BLOCK_SIZE: Final = 16
MAX_CONVERSATIONS: Final = 100_000
FLUSH_S: Final = 1.0
# Integers that every JSON reader keeps exactly.
_HASH_BITS: Final = 53


class TraceHeader(msgspec.Struct, kw_only=True):
    """The first line. started_unix_s: what timestamps count from. tokenizer: whose tokens the lengths count."""

    format: str = TRACE_FORMAT
    version: int = TRACE_VERSION
    block_size: int = BLOCK_SIZE
    started_unix_s: float = 0.0
    model: str = ""
    tokenizer: str = ""
    has_contents: bool = False
    source: str = ""


class TraceRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One request. timestamp: its arrival, milliseconds after the start (Mooncake's name and unit).

    input_length, output_length: tokens. hash_ids: of the whole blocks of the prompt; answer_hash_ids: of the blocks
    that the answer completed after them. parent_id: the request whose prompt and answer this prompt continues;
    think_ms: from its end to this arrival. cancelled_after_ms: when the client hung up. tenant: a salted hash.
    parameters: as sent, without contents. payload: the body, where contents are kept.
    """

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int] = []
    answer_hash_ids: list[int] = []
    id: str = ""
    session_id: str = ""
    parent_id: str = ""
    think_ms: float | None = None
    tenant: str = ""
    endpoint: str = ""
    parameters: dict[str, Any] = {}
    status: int = 200
    finish_reason: str = ""
    cancelled_after_ms: float | None = None
    cached_tokens: int | None = None
    ttft_ms: float | None = None
    e2e_ms: float | None = None
    payload: Any = None


class BlockHasher:
    """Hashes whole blocks, each with everything before it. salt: secret, and the same for a whole trace."""

    def __init__(self, salt: bytes, block_size: int = BLOCK_SIZE) -> None:
        self._salt = salt[:64]
        self.block_size = block_size

    def hash_blocks(self, tokens: Sequence[int], before: Sequence[int] = ()) -> list[int]:
        """Hashes of the whole blocks of `tokens` from the one after `before`, the hashes of the first ones."""
        size, parent = self.block_size, before[-1] if before else 0
        hashes = []
        for start in range(len(before) * size, len(tokens) - size + 1, size):
            block = b",".join(b"%d" % token for token in tokens[start : start + size])
            parent = self._hash(b"%d|%s" % (parent, block))
            hashes.append(parent)
        return hashes

    def name(self, text: str) -> str:
        """A short name for something that is not to be told, such as a tenant; "" stays ""."""
        return f"{self._hash(text.encode()):x}" if text else ""

    def _hash(self, content: bytes) -> int:
        digest = hashlib.blake2b(content, key=self._salt, digest_size=8).digest()
        return int.from_bytes(digest, "big") >> (64 - _HASH_BITS)


class ConversationEnd(msgspec.Struct, frozen=True):
    """A recorded request that a later one may continue. num_tokens: of prompt and answer. Times as the records'."""

    id: str
    session_id: str
    num_tokens: int
    ended_ms: float


class ConversationIndex:
    """Finds which recorded request a prompt continues: the one whose prompt and answer it begins with.

    Only answers that completed a block can be told apart from their prompt, so only these have a successor.
    """

    def __init__(self) -> None:
        self._ends: OrderedDict[int, ConversationEnd] = OrderedDict()

    def add(self, answer_hash_ids: Sequence[int], end: ConversationEnd) -> None:
        """Remembers an answered request."""
        if answer_hash_ids:
            self._ends[answer_hash_ids[-1]] = end
            if len(self._ends) > MAX_CONVERSATIONS:
                self._ends.popitem(last=False)

    def find(self, hash_ids: Sequence[int], num_tokens: int) -> ConversationEnd | None:
        """The longest one that this prompt of `num_tokens` tokens goes beyond."""
        for hash_id in reversed(hash_ids):
            end = self._ends.get(hash_id)
            if end is not None and end.num_tokens < num_tokens:
                return end
        return None


class TrafficRecorder:
    """Appends records to one file of a directory. Written from one thread; a record is one write of the buffer.

    clock: seconds; what timestamps are taken from. Raises ConfigError when the file cannot be made.
    """

    def __init__(
        self, directory: Path, header: TraceHeader, clock: Callable[[], float] = time.monotonic, salt: bytes = b""
    ) -> None:
        self.hasher = BlockHasher(salt or secrets.token_bytes(32), header.block_size)
        self.has_contents = header.has_contents
        self._clock = clock
        self._conversations = ConversationIndex()
        self._encoder = msgspec.json.Encoder()
        self._start_s = self._flushed_s = clock()
        header = msgspec.structs.replace(header, started_unix_s=time.time())
        name = time.strftime("traffic-%Y%m%dT%H%M%S", time.gmtime(header.started_unix_s))
        self.path = directory / f"{name}-{os.getpid()}.jsonl"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("xb")
        except OSError as error:
            raise ConfigError(
                f"Traffic cannot be recorded in {directory}: {error.strerror}.", remedy="Name a writable directory."
            ) from None
        self._file.write(self._encoder.encode(header) + b"\n")

    def milliseconds(self, moment_s: float) -> float:
        """A moment of the clock as a record's timestamp."""
        return round((moment_s - self._start_s) * 1e3, 3)

    def record(self, record: TraceRecord, prompt: Sequence[int], answer: Sequence[int], ended_s: float) -> None:
        """Fills in hashes and the conversation, and writes. prompt, answer: tokens. ended_s: of the clock."""
        record.hash_ids = self.hasher.hash_blocks(prompt)
        record.answer_hash_ids = self.hasher.hash_blocks([*prompt, *answer], record.hash_ids)
        before = self._conversations.find(record.hash_ids, len(prompt))
        record.session_id = record.id
        if before is not None:
            record.parent_id, record.session_id = before.id, before.session_id
            record.think_ms = max(0.0, round(record.timestamp - before.ended_ms, 3))
        ended_ms = self.milliseconds(ended_s)
        end = ConversationEnd(record.id, record.session_id, len(prompt) + len(answer), ended_ms)
        self._conversations.add(record.answer_hash_ids, end)
        self._file.write(self._encoder.encode(record) + b"\n")
        if self._clock() - self._flushed_s > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        self._file.flush()
        self._flushed_s = self._clock()

    def close(self) -> None:
        self._file.close()


_REDACTED: Final = re.compile(
    r"[\w.+-]+@[\w-]+\.[\w.-]+"  # mail addresses
    r"|\b(?:sk|pk|ghp|xox[abp]|hf|AKIA)[-_A-Za-z0-9]{12,}\b"  # keys of well-known services
    r"|\b(?:\d[ -]?){12,18}\d\b"  # card and account numbers
    r"|\+?\d[\d ()/-]{7,}\d"  # telephone numbers
)


def redacted(value: Any) -> Any:
    """JSON with addresses, keys, card and telephone numbers in its texts replaced. What it knows, not all there is."""
    if isinstance(value, str):
        return _REDACTED.sub("[redacted]", value)
    if isinstance(value, list):
        return [redacted(item) for item in value]
    if isinstance(value, dict):
        return {key: redacted(item) for key, item in value.items()}
    return value
