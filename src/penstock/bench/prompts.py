"""Prompts of a wanted length without the server's tokenizer: token ids, or words of about one token each."""

from __future__ import annotations

import functools
import random
from typing import Final

import numpy as np

from penstock.bench.plan import Message, Prompt

FIRST_PLAIN_TOKEN: Final = 16
DEFAULT_TOKEN_LIMIT: Final = 1000
_CACHED_BLOCKS: Final = 8192
# Frequent English words, which common tokenizers hold whole, with their leading space.
WORDS: Final = tuple(
    """
    inal time year people way day man thing woman life child world school state family student group country
    problem hand part place case week company system program question work government number night point home
    water room mother area money story fact month lot right study book eye job word business issue side kind head
    house service friend father power hour game line end member law car city community name president team minute
    idea kid body information back parent face others level office door health person art war history party result
    change morning reason research girl guy moment air teacher force education foot boy age policy music market
    sense nation plan college interest death experience effect use class control field development role effort
    rate heart drug show leader light voice wife police mind price report decision son view relationship town road
    arm difference value building action season
    """.split()  # noqa: SIM905 - a list of 200 quoted words is no easier to read
)


class PromptMaker:
    """Makes prompts. as_chat: one user message of words, else token ids in [16, token_limit).

    seed: with another one, blocks of the same hash have other tokens, so that a run does not find the cache of the
    one before.
    """

    def __init__(self, as_chat: bool, token_limit: int = DEFAULT_TOKEN_LIMIT, seed: int = 0) -> None:
        self.as_chat = as_chat
        self.seed = seed
        self.token_limit = max(FIRST_PLAIN_TOKEN + 1, token_limit)

    def tokens(self, source: random.Random, count: int) -> list[int]:
        drawn = np.frombuffer(source.randbytes(4 * count), np.uint32)
        tokens: list[int] = (drawn % (self.token_limit - FIRST_PLAIN_TOKEN) + FIRST_PLAIN_TOKEN).tolist()
        return tokens

    def block(self, key: int | str, size: int) -> tuple[int, ...]:
        """The tokens that stand for a block known by its hash only: the same for the same hash."""
        return _block_tokens(f"{self.seed} {key}", size, self.token_limit)

    def prompt(self, tokens: list[int]) -> Prompt:
        return [self.message(tokens)] if self.as_chat else tokens

    def message(self, tokens: list[int]) -> Message:
        return {"role": "user", "content": words(tokens)}


def words(tokens: list[int]) -> str:
    """A text with a word for each token."""
    return " ".join(WORDS[token % len(WORDS)] for token in tokens)


@functools.lru_cache(maxsize=_CACHED_BLOCKS)
def _block_tokens(key: str, size: int, token_limit: int) -> tuple[int, ...]:
    seed = random.Random(key).getrandbits(64)
    return tuple(np.random.default_rng(seed).integers(FIRST_PLAIN_TOKEN, token_limit, size).tolist())
