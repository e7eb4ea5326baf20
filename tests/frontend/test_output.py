"""Engine outputs become text deltas, log-probabilities, a reason and usage, the same for every batching of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.frontend.output import OutputState, TextOutput
from penstock.frontend.parsers.blocks import Block, BlockParser, ToolFormat
from penstock.frontend.parsers.call_readers import JsonCallReader
from penstock.frontend.parsers.parts import ToolCall, merge_parts
from penstock.frontend.tokenizer import Tokenizer
from penstock.messages import FinishReason, RequestOutput, SamplingParams, TokenLogprobs

many = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def tokenizer(tokenizer_of: Callable[[str], Tokenizer]) -> Tokenizer:
    return tokenizer_of("llama3")


def run(
    tokenizer: Tokenizer, ids: list[int], sampling: SamplingParams, sizes: list[int], **last: Any
) -> list[TextOutput]:
    """Passes the tokens in groups of the given sizes, the rest in the last output, until the text has ended."""
    state = OutputState(tokenizer, sampling, [1, 2, 3])
    results, rest = [], ids
    for size in sizes:
        results.append(state.process(RequestOutput("r", rest[:size])))
        rest = rest[size:]
        if results[-1].finish_reason is not None:
            return results
    results.append(state.process(RequestOutput("r", rest, **{"finish_reason": FinishReason.LENGTH, **last})))
    return results


@many
@given(
    text=st.text(alphabet="ab\n é水", max_size=30),
    stops=st.lists(st.text(alphabet="ab\n水", min_size=1, max_size=3), max_size=3),
    sizes=st.lists(st.integers(1, 4), max_size=12),
    min_tokens=st.integers(0, 8),
    include=st.booleans(),
)
def test_any_batching_gives_the_same_text(
    text: str, stops: list[str], sizes: list[int], min_tokens: int, include: bool, tokenizer: Tokenizer
) -> None:
    sampling = SamplingParams(stop=tuple(stops), min_tokens=min_tokens, include_stop_str_in_output=include)
    ids = tokenizer.encode_user(text, add_special_tokens=False)
    batched = run(tokenizer, ids, sampling, sizes)
    single = run(tokenizer, ids, sampling, [1] * len(ids))
    for results in (batched, single):
        assert all(result.finish_reason is None for result in results[:-1])
    joined = "".join(result.text for result in batched)
    assert joined == "".join(result.text for result in single)
    assert (batched[-1].finish_reason, batched[-1].stop_reason) == (single[-1].finish_reason, single[-1].stop_reason)
    assert batched[-1].num_output_tokens == single[-1].num_output_tokens
    token_ids = [token_id for result in batched for token_id in result.token_ids]
    assert token_ids == ids[: len(token_ids)]
    assert batched[-1].num_output_tokens == len(token_ids)
    decoded = tokenizer.decode(token_ids)
    if batched[-1].finish_reason is FinishReason.STOP:
        assert batched[-1].stop_reason in stops
        assert decoded.startswith(joined)
        assert len(token_ids) > min_tokens
        assert include == joined.endswith(batched[-1].stop_reason) or not include
    else:
        assert joined == decoded == tokenizer.decode(ids)


def test_a_stop_string_tells_the_engine_to_stop(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_user("one\n\ntwo", add_special_tokens=False)
    results = run(tokenizer, ids, SamplingParams(stop=("\n\n",)), [1] * len(ids))
    assert "".join(result.text for result in results) == "one"
    assert results[-1].must_abort
    assert results[-1].finish_reason is FinishReason.STOP
    assert results[-1].stop_reason == "\n\n"
    together = run(tokenizer, ids, SamplingParams(stop=("\n\n",)), [])
    assert not together[-1].must_abort, "the engine has ended by itself in the same step"
    assert together[-1].finish_reason is FinishReason.STOP


@pytest.mark.parametrize("in_tokens", [False, True])
def test_the_ending_token_is_no_text(tokenizer: Tokenizer, in_tokens: bool) -> None:
    eos = tokenizer.eos_token_ids[0]
    ids = tokenizer.encode_user("done", add_special_tokens=False)
    given_ids = [*ids, eos] if in_tokens else ids
    for skip in (False, True):
        sampling = SamplingParams(skip_special_tokens=skip)
        (result,) = run(tokenizer, given_ids, sampling, [], finish_reason=FinishReason.STOP, stop_token_id=eos)
        assert (result.text, result.token_ids, result.stop_reason) == ("done", ids, None)
        assert result.num_output_tokens == len(ids) + 1
        assert not result.must_abort


def test_a_stop_token_of_the_request_is_the_reason(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_user("ab", add_special_tokens=False)
    stop = tokenizer.token_to_id("!")
    ending = {"finish_reason": FinishReason.STOP, "stop_token_id": stop}
    (result,) = run(tokenizer, [*ids, stop], SamplingParams(stop_token_ids=(stop,)), [], **ending)
    assert (result.text, result.stop_reason) == ("ab", stop)
    including = SamplingParams(stop_token_ids=(stop,), include_stop_str_in_output=True)
    (result,) = run(tokenizer, [*ids, stop], including, [], **ending)
    assert result.text == "ab!"


def test_text_held_back_comes_with_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_user("a STO", add_special_tokens=False)
    for reason in (FinishReason.LENGTH, FinishReason.ABORT, FinishReason.TIMEOUT):
        results = run(tokenizer, ids, SamplingParams(stop=("STOP",)), [len(ids)], finish_reason=reason)
        assert [result.text for result in results] == ["a ", "STO"]
        assert results[-1].finish_reason is reason


def _logprobs(ids: list[int]) -> list[TokenLogprobs]:
    return [TokenLogprobs(token_id, -0.5, 1, [token_id, 7], [-0.5, -1.5]) for token_id in ids]


def test_logprobs_carry_bytes_and_offsets(tokenizer: Tokenizer) -> None:
    text = "An 水 o"
    ids = tokenizer.encode_user(text, add_special_tokens=False)
    state = OutputState(tokenizer, SamplingParams(logprobs=2), [1])
    result = state.process(RequestOutput("r", ids, _logprobs(ids), finish_reason=FinishReason.LENGTH))
    assert result.logprobs is not None
    assert [entry.token.token_id for entry in result.logprobs] == ids
    assert b"".join(entry.token.data for entry in result.logprobs) == text.encode()
    assert result.text == text
    for entry in result.logprobs:
        if "\ufffd" not in entry.token.text:
            assert text.startswith(entry.token.text, entry.text_offset)
        assert [top.token_id for top in entry.top] == [entry.token.token_id, 7]
    assert result.logprobs[-1].text_offset == len(text) - len(result.logprobs[-1].token.text)


def test_logprobs_end_with_the_stop_string(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_user("a!b!c", add_special_tokens=False)
    state = OutputState(tokenizer, SamplingParams(stop=("!",), logprobs=0), [1])
    result = state.process(RequestOutput("r", ids, _logprobs(ids)))
    assert result.logprobs is not None
    assert [entry.token.token_id for entry in result.logprobs] == result.token_ids == ids[:2]
    assert result.num_output_tokens == 2


def test_prompt_logprobs_have_an_entry_for_each_token(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode_user("Prompt 水!", add_special_tokens=True)
    state = OutputState(tokenizer, SamplingParams(prompt_logprobs=1), prompt)
    result = state.process(RequestOutput("r", [], prompt_logprobs=_logprobs(prompt[1:]), num_prompt_tokens=len(prompt)))
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs[0] is None
    assert [entry.token.token_id for entry in result.prompt_logprobs[1:]] == prompt[1:]
    shown = tokenizer.decode(prompt, skip_special_tokens=False)
    first = result.prompt_logprobs[1]
    assert shown[first.text_offset :].startswith(first.token.text)
    assert result.num_prompt_tokens == len(prompt)


def test_a_parser_sees_its_markers_where_they_are_special_tokens(tokenizer: Tokenizer) -> None:
    """Other special tokens stay out of the text, as without a parser."""
    content = next(iter(tokenizer.special_tokens.values()))
    other = next(token for token in tokenizer.special_token_ids if token != tokenizer.token_to_id(content))
    marker_id = tokenizer.token_to_id(content)
    assert marker_id is not None
    call = ToolFormat("test", (), (Block(content, "", JsonCallReader),))
    written = tokenizer.encode_user('{"name": "f", "arguments": {"a": 1}}', add_special_tokens=False)
    ids = [*tokenizer.encode_user("So:", add_special_tokens=False), other, marker_id, *written]
    for size in (1, 2, 100):
        state = OutputState(tokenizer, SamplingParams(), [1], BlockParser(call, {}), call.markers)
        parts: list[Any] = []
        for start in range(0, len(ids), size):
            is_last = start + size >= len(ids)
            reason = FinishReason.STOP if is_last else None
            parts += state.process(RequestOutput("r", ids[start : start + size], finish_reason=reason)).parts or []
        assert merge_parts(parts) == ["So:", ToolCall("f", '{"a": 1}')]
    assert tokenizer.decode(ids) == 'So:{"name": "f", "arguments": {"a": 1}}'
