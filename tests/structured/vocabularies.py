"""A small vocabulary: every byte, some longer pieces, control tokens, an end."""

from __future__ import annotations

import re

from penstock.messages import Vocabulary

PIECES = [b'"}', b'": ', b'", "', b'{"', b"tool", b"name", b"  ", b"hello", b"the ", b"\n\n", b"]}", b"123"]
CONTROL = ["<tool_call>", "</tool_call>", "</think>"]
EOS = 256 + len(PIECES) + len(CONTROL)


def small_vocabulary(num_unused: int = 3) -> Vocabulary:
    """num_unused: ids at the end without text, as padded checkpoints have them."""
    tokens = [*(bytes((byte,)) for byte in range(256)), *PIECES, *(text.encode() for text in CONTROL), b"<eos>"]
    return Vocabulary([*tokens, *[b""] * num_unused], list(range(256 + len(PIECES), EOS + 1)), [EOS])


def tokenize(text: str) -> list[int]:
    """Control tokens where they are written out, one token a byte elsewhere."""
    ids: list[int] = []
    for piece in re.split(f"({'|'.join(CONTROL)})", text):
        ids += [256 + len(PIECES) + CONTROL.index(piece)] if piece in CONTROL else list(piece.encode())
    return ids
