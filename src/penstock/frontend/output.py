"""What an engine says of one sequence, turned into text: deltas, log-probabilities, how it ended, what it cost.

Owns: the state of the text of the streams in progress.
"""

from __future__ import annotations

from typing import Final

import msgspec

from penstock.frontend.parsers.parts import Part, PartParser
from penstock.frontend.stop_strings import StopStringMatcher
from penstock.frontend.tokenizer import Tokenizer
from penstock.messages import (
    ErrorInfo,
    FinishReason,
    GrammarKind,
    RequestOutput,
    RequestTimings,
    SamplingParams,
    TokenLogprobs,
)


class TokenEntry(msgspec.Struct, array_like=True, gc=False):
    """A token by name: its text (U+FFFD for parts of characters), its exact bytes, its log-probability."""

    token_id: int
    text: str
    data: bytes
    logprob: float


class LogprobEntry(msgspec.Struct, array_like=True, gc=False):
    """One position's log-probabilities. text_offset: characters of text before the token. rank: 1 is likeliest.

    top: the likeliest tokens, best first, as many as were asked for.
    """

    token: TokenEntry
    rank: int
    text_offset: int
    top: list[TokenEntry]


class TextOutput(msgspec.Struct, gc=False):
    """One step of one choice. The last one has a finish_reason.

    text: what follows the text so far. token_ids: the tokens behind it, without those after a stop string and without
    the token that ended the sequence. stop_reason: the stop string or token that ended it, when one did (None for an
    end-of-sequence token). must_abort: a stop string ended it, so the engine has to be told (AbortRequest with
    FinishReason.STOP); no further engine output is to be passed in.
    num_output_tokens: tokens generated so far, the one that ended it included.
    stop_token_id: the token that ended it, None where none did.
    parts: what a parser made of the text so far that it had not given out; None without a parser.
    pooled: of a one-pass request, whose only output this is: little-endian float32.
    """

    text: str
    token_ids: list[int]
    parts: list[Part] | None = None
    logprobs: list[LogprobEntry] | None = None
    prompt_logprobs: list[LogprobEntry | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    stop_token_id: int | None = None
    must_abort: bool = False
    error: ErrorInfo | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    timings: RequestTimings | None = None
    pooled: bytes | None = None


class OutputState:
    """The text side of one choice: pass it every RequestOutput of its request, in order."""

    __slots__ = (
        "_eos_token_ids",
        "_include_stop",
        "_matcher",
        "_min_tokens",
        "_num_chars",
        "_num_tokens",
        "_parser",
        "_prompt_token_ids",
        "_stream",
        "_tokenizer",
        "_with_logprobs",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        prompt_token_ids: list[int],
        parser: PartParser | None = None,
        markers: frozenset[str] = frozenset(),
    ) -> None:
        """parser: takes the text apart. markers: special tokens that it has to see."""
        self._tokenizer: Final = tokenizer
        self._stream: Final = tokenizer.detokenizer(
            skip_special_tokens=sampling.skip_special_tokens,
            markers=markers,
            keep_first_space=sampling.grammar is not None and sampling.grammar.kind is not GrammarKind.TEXT,
        )
        self._parser: Final = parser
        self._matcher: Final = (
            StopStringMatcher(sampling.stop, include_in_output=sampling.include_stop_str_in_output)
            if sampling.stop
            else None
        )
        self._include_stop: Final = sampling.include_stop_str_in_output
        self._min_tokens: Final = sampling.min_tokens
        self._with_logprobs: Final = sampling.logprobs is not None
        self._eos_token_ids: Final = tokenizer.eos_token_ids
        self._prompt_token_ids: Final = prompt_token_ids
        self._num_tokens = 0
        self._num_chars = 0  # given out by the detokenizer, held back by the matcher or not

    def process(self, output: RequestOutput) -> TextOutput:
        """The text that is certain now. Output after one with a finish_reason is not accepted."""
        token_ids = output.token_ids
        if output.stop_token_id is not None and token_ids and token_ids[-1] == output.stop_token_id:
            token_ids = token_ids[:-1]  # it ends the text and is none
        result = TextOutput("", token_ids, finish_reason=output.finish_reason, error=output.error)
        if self._matcher is None and not self._with_logprobs:
            if token_ids:
                result.text = self._stream.add(token_ids)
            self._num_tokens += len(token_ids)
        else:
            self._process_each(output, token_ids, result)
        if result.finish_reason is not None and not result.must_abort:
            self._finish(output, result)
        if self._parser is not None:
            result.parts = self._parser.feed(result.text) if result.text else []
            if result.finish_reason is not None:
                result.parts += self._parser.finish()
        result.num_output_tokens = self._num_tokens
        result.num_prompt_tokens = output.num_prompt_tokens or len(self._prompt_token_ids)
        result.num_cached_tokens = output.num_cached_tokens
        result.timings = output.timings
        if output.prompt_logprobs is not None:
            result.prompt_logprobs = self._prompt_entries(output.prompt_logprobs)
        return result

    def _process_each(self, output: RequestOutput, token_ids: list[int], result: TextOutput) -> None:
        """Token by token, where a stop string may end the text between two, or each needs its offset."""
        texts: list[str] = []
        entries: list[LogprobEntry] = []
        for index, token_id in enumerate(token_ids):
            offset = self._num_chars
            text = self._stream.add((token_id,))
            self._num_chars += len(text)
            self._num_tokens += 1
            if output.logprobs is not None and index < len(output.logprobs):
                entries.append(self._entry(output.logprobs[index], offset))
            if self._matcher is not None and self._num_tokens > self._min_tokens:
                text = self._matcher.feed(text)
            texts.append(text)
            if self._matcher is not None and self._matcher.matched is not None:
                result.token_ids = token_ids[: index + 1]
                self._stop(result)
                break
        result.text = "".join(texts)
        result.logprobs = entries if self._with_logprobs else None

    def _stop(self, result: TextOutput) -> None:
        """A stop string was found: whatever the engine said, this is how the sequence ended."""
        assert self._matcher is not None
        result.must_abort = result.finish_reason is None
        result.finish_reason = FinishReason.STOP
        result.stop_reason = self._matcher.matched

    def _finish(self, output: RequestOutput, result: TextOutput) -> None:
        """Gives out what was held back, which may yet complete a stop string."""
        if result.stop_reason is not None:
            return
        text = ""
        if output.stop_token_id is not None:
            self._num_tokens += 1
            result.stop_token_id = output.stop_token_id
            if output.stop_token_id not in self._eos_token_ids:
                result.stop_reason = output.stop_token_id
            if self._include_stop:
                text = self._stream.add((output.stop_token_id,))
        text += self._stream.finish()
        if self._matcher is not None and self._num_tokens > self._min_tokens:
            text = self._matcher.feed(text)
            if self._matcher.matched is not None:
                self._stop(result)
            else:
                text += self._matcher.finish()
        result.text += text

    def _entry(self, logprobs: TokenLogprobs, offset: int) -> LogprobEntry:
        top = zip(logprobs.top_ids, logprobs.top_logprobs, strict=True)
        return LogprobEntry(
            self._token(logprobs.token_id, logprobs.logprob),
            logprobs.rank,
            offset,
            [self._token(token_id, logprob) for token_id, logprob in top],
        )

    def _token(self, token_id: int, logprob: float) -> TokenEntry:
        data = self._tokenizer.token_bytes(token_id)
        return TokenEntry(token_id, data.decode("utf-8", "replace"), data, logprob)

    def _prompt_entries(self, logprobs: list[TokenLogprobs]) -> list[LogprobEntry | None]:
        """One for each prompt token; none for the first, which nothing predicts."""
        stream = self._tokenizer.detokenizer(skip_special_tokens=False)
        entries: list[LogprobEntry | None] = [None]
        num_chars = len(stream.add(self._prompt_token_ids[:1]))
        for token_id, position in zip(self._prompt_token_ids[1:], logprobs, strict=True):
            entries.append(self._entry(position, num_chars))
            num_chars += len(stream.add((token_id,)))
        return entries
