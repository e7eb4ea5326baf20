"""Token sequences for a prefix cache: beginnings of two sequences with a tail, in two namespaces.

So prefixes are shared, computed twice and left half-way.
"""

from __future__ import annotations

import random

from hypothesis import strategies as st

Prefix = tuple[str, tuple[int, ...]]  # a namespace and tokens

BASES = [[0] * 8, [0, 0, 0, 1, 1, 1, 0, 1]]

tokens_of = st.builds(
    lambda base, length, tail: base[:length] + tail,
    st.sampled_from(BASES),
    st.integers(1, 8),
    st.lists(st.integers(0, 1), max_size=2),
)
namespaces = st.sampled_from(["", "tenant"])


def draw_tokens(rng: random.Random) -> list[int]:
    """As `tokens_of`, for walks too long for hypothesis."""
    return rng.choice(BASES)[: rng.randint(1, 8)] + [rng.randrange(2) for _ in range(rng.randrange(3))]
