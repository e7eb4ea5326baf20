"""vLLM's additions that generate nothing: POST /tokenize, /detokenize, and /v1/render."""

from __future__ import annotations

import msgspec

from penstock.base.errors import ValidationError
from penstock.frontend.processor import Chat, Prompt
from penstock.messages.bounds import MAX_ENTRIES
from penstock.server.body import decode_body, with_ignored
from penstock.server.exchange import Exchange
from penstock.server.openai import decode
from penstock.server.openai.chat import chat_of
from penstock.server.openai.schema import ChatMessage, DetokenizeRequest, TokenizeRequest
from penstock.server.state import ServerState

_tokenize_decoder = msgspec.json.Decoder(TokenizeRequest)
_detokenize_decoder = msgspec.json.Decoder(DetokenizeRequest)


class TokenRoutes:
    """Handlers. Each is a `call.Handler`."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def tokenize(self, body: bytes, _exchange: Exchange) -> object:
        engine, text = self._state.parts()
        request, ignored = decode_body(_tokenize_decoder, body, lenient=self._state.settings.lenient)
        self._check_model(request.model)
        if (request.prompt is None) is (request.messages is None):
            raise ValidationError("Give either prompt or messages.", param="prompt")
        if request.messages is not None:
            prompt = await text.prompt(_chat(request.messages, request))
        else:
            prompt = await text.prompt(request.prompt or "", add_special_tokens=request.add_special_tokens is not False)
        ids, max_model_len = prompt.token_ids, engine.ready.max_model_len
        answer: dict[str, object] = {"count": len(ids), "max_model_len": max_model_len, "tokens": ids}
        if request.return_token_strs:
            answer["token_strs"] = text.token_texts(ids)
        return with_ignored(answer, ignored)

    async def detokenize(self, body: bytes, _exchange: Exchange) -> object:
        engine, text = self._state.parts()
        request, ignored = decode_body(_detokenize_decoder, body, lenient=self._state.settings.lenient)
        self._check_model(request.model)
        vocab_size, max_tokens = engine.ready.vocab_size, engine.ready.max_model_len
        if len(request.tokens) > max_tokens or not all(0 <= token < vocab_size for token in request.tokens):
            raise ValidationError(f"tokens takes at most {max_tokens} ids below {vocab_size}.", param="tokens")
        return with_ignored({"prompt": text.decode(request.tokens)}, ignored)

    async def render(self, body: bytes, _exchange: Exchange) -> object:
        """What /v1/chat/completions would make of the same body."""
        _, text = self._state.parts()
        request, ignored = decode.decode_chat(body, lenient=self._state.settings.lenient)
        self._check_model(request.model)
        prompt: Prompt = await text.prompt(chat_of(request))
        return with_ignored({"prompt": prompt.text, "token_ids": prompt.token_ids}, ignored)

    def _check_model(self, name: str | None) -> None:
        if name is not None:
            self._state.check_model(name)


def _chat(messages: list[ChatMessage], request: TokenizeRequest) -> Chat:
    if not 0 < len(messages) <= MAX_ENTRIES["messages"]:
        raise ValidationError(f"messages must have 1 to {MAX_ENTRIES['messages']} entries.", param="messages")
    is_continued = bool(request.continue_final_message)
    generates = request.add_generation_prompt
    return Chat(
        messages=decode.template_messages(messages),
        tools=request.tools or None,
        add_generation_prompt=not is_continued if generates is None else generates,
        continue_final_message=is_continued,
        variables=request.chat_template_kwargs or {},
    )
