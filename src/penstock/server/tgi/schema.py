"""The requests as typed structs: what a client may send, field by field. An unknown field is an error.

Fields typed `Any` are TGI's that are not supported: only their no-op values pass (see NO_OP_VALUES).
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec


class Grammar(msgspec.Struct, forbid_unknown_fields=True):
    """value: a JSON schema, a pattern, or for `json_schema` an object with a schema and perhaps a name."""

    type: Literal["json", "regex", "json_schema"]
    value: dict[str, Any] | str


class Parameters(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Without do_sample, a temperature or a filter, generation is greedy."""

    max_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: list[str] | None = None
    stop_sequences: list[str] | None = None
    details: bool | None = None
    return_full_text: bool | None = None
    top_n_tokens: int | None = None
    best_of: Any = None
    decoder_input_details: Any = None
    truncate: Any = None
    typical_p: float | None = None
    watermark: Any = None
    grammar: Grammar | None = None
    adapter_id: Any = None


class GenerateRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /, /generate and /generate_stream. stream: for `/`."""

    inputs: str
    parameters: Parameters | None = None
    stream: bool | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /tokenize with `inputs`."""

    inputs: str
    add_special_tokens: bool | None = None
    parameters: None = None


# Values that ask for what happens anyway; any other value of these fields is refused by name.
NO_OP_VALUES: Final[dict[str, tuple[Any, ...]]] = {
    "best_of": (1,),
    "decoder_input_details": (False,),
    "truncate": (),
    "watermark": (False,),
    "adapter_id": (),
}
