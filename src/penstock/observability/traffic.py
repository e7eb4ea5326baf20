"""Recorded traffic: one JSON line a request, after a header line. A superset of Mooncake's trace format.

Prompts are kept as salted hashes of their blocks, each of all that comes before it, so two prompts share leading
hashes exactly as far as they share leading blocks; without the salt, which is not written, a guessed prompt cannot be
confirmed. Contents are kept only where asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final

import msgspec

TRACE_FORMAT: Final = "penstock-trace"
TRACE_VERSION: Final = 1
BLOCK_SIZE: Final = 16
# Integers that every JSON reader keeps exactly.
_HASH_BITS: Final = 53


class TraceHeader(msgspec.Struct, kw_only=True, omit_defaults=True):
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
