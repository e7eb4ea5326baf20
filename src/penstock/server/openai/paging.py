"""The pages of OpenAI's lists: `after` and `limit` in a query, `has_more` and the edges in the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qs

from penstock.base.errors import ValidationError
from penstock.server.exchange import Exchange

Query = dict[str, str]


def query_of(exchange: Exchange, known: Sequence[str]) -> Query:
    """The query's parameters; of several values of one, the first. Raises ValidationError for an unknown one."""
    given = parse_qs(exchange.scope.get("query_string", b"").decode("latin-1"), max_num_fields=32)
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        raise ValidationError(f"{unknown[:100]} is not a known parameter.", param=unknown[:100])
    return {name: values[0] for name, values in given.items()}


def limit_of(query: Query, default: int, highest: int) -> int:
    """Raises ValidationError."""
    text = query.get("limit", str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and 1 <= int(text) <= highest):
        raise ValidationError(f"limit must be 1 to {highest}.", param="limit")
    return int(text)


def page(data: list[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    edges = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
    return {"object": "list", "data": data, "has_more": has_more, **edges}
