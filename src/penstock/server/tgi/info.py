"""GET /info, and /tokenize in TGI's words."""

from __future__ import annotations

from typing import Any

import msgspec

from penstock.base.errors import ValidationError
from penstock.messages.bounds import BOUNDS, MAX_ENTRIES
from penstock.server.body import decode_body
from penstock.server.exchange import Exchange
from penstock.server.state import ServerState
from penstock.server.tgi.schema import TokenizeRequest

_decoder = msgspec.json.Decoder(TokenizeRequest)


class TgiRoutes:
    """Handlers. Each is a `call.Handler`."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def info(self, _body: bytes, _exchange: Exchange) -> object:
        engine, _ = self._state.parts()
        ready, info = engine.ready, self._state.info
        return {
            "model_id": self._state.model_names[0],
            "model_sha": self._state.system_fingerprint,
            "model_dtype": ready.dtype,
            "model_device_type": "cpu",
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": ready.max_num_seqs,
            "max_best_of": 1,
            "max_stop_sequences": MAX_ENTRIES["stop"],
            "max_top_n_tokens": int(BOUNDS["logprobs"][1]),
            "max_input_tokens": ready.max_model_len - 1,
            "max_total_tokens": ready.max_model_len,
            "max_batch_total_tokens": ready.num_blocks * ready.block_size,
            "validation_workers": 1,
            "max_client_batch_size": 1,
            "router": "penstock",
            "version": info.version,
        }

    async def tokenize(self, body: bytes, _exchange: Exchange) -> object:
        """Each token with its text and where in the input it stands (in characters), as a bare list: no warnings."""
        _, text = self._state.parts()
        request, _ = decode_body(_decoder, body)
        if not request.inputs:
            raise ValidationError("inputs is empty.", param="inputs")
        prompt = await text.prompt(request.inputs, add_special_tokens=request.add_special_tokens is not False)
        tokens: list[dict[str, Any]] = []
        position = 0
        for token_id, piece in zip(prompt.token_ids, text.token_texts(prompt.token_ids), strict=True):
            start = request.inputs.find(piece, position) if piece else position
            end = start + len(piece) if start >= 0 else position
            tokens.append({"id": token_id, "text": piece, "start": max(start, position), "stop": end})
            position = max(position, end)
        return tokens
