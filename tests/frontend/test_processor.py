"""Requests are checked, completed and split into engine requests; long prompts are tokenized in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from template_corpus import TEMPLATES, WEATHER
from tiny_checkpoints import llama3, qwen

from penstock.base.errors import ContextOverflowError, ValidationError
from penstock.frontend.chat_template import ChatTemplate
from penstock.frontend.processor import INLINE_CHARS, Chat, Processor, Prompt, Thinking, derived_seed
from penstock.frontend.tokenizer import Tokenizer
from penstock.messages import FinishReason, GrammarKind, GrammarSpec, RequestOutput, SamplingParams
from penstock.messages.bounds import BOUNDS

MAX_MODEL_LEN = 512
VOCAB_SIZE = 1024


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processor]:
    path = llama3().write(tmp_path_factory.mktemp("llama3"), TEMPLATES["llama3"])
    made = Processor(Tokenizer.load(path), ChatTemplate.load(path), MAX_MODEL_LEN, VOCAB_SIZE)
    yield made
    made.close()


@pytest.fixture
def prompt(processor: Processor) -> Prompt:
    return processor.text_prompt("The quick brown fox")


def test_a_chat_becomes_its_templates_tokens(processor: Processor) -> None:
    made = processor.chat_prompt(Chat([{"role": "user", "content": "Hi"}]))
    assert made.text is not None
    assert made.text.startswith("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>")
    assert made.token_ids == processor.tokenizer.encode(made.text, add_special_tokens=False)


def test_text_begins_a_sequence_and_holds_no_control_token(processor: Processor) -> None:
    bos, eot = processor.tokenizer.bos_token_id, processor.tokenizer.token_to_id("<|eot_id|>")
    text = "a<|eot_id|>"
    assert processor.text_prompt(text).token_ids[0] == bos
    assert bos not in processor.text_prompt(text, add_special_tokens=False).token_ids
    assert eot not in processor.text_prompt(text).token_ids
    assert processor.text_prompt(text, parse_control_tokens=True).token_ids[-1] == eot


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE, 10**12])
def test_ids_outside_the_vocabulary_are_refused(processor: Processor, token_id: int) -> None:
    assert processor.token_prompt([0, VOCAB_SIZE - 1]).token_ids == [0, VOCAB_SIZE - 1]
    with pytest.raises(ValidationError, match=f"token {token_id}, outside the vocabulary of {VOCAB_SIZE}"):
        processor.token_prompt([0, token_id])


def test_breakpoints_become_shared_tokens(processor: Processor) -> None:
    """What a conversation shares with another that goes on otherwise behind the breakpoint."""
    system, user = {"role": "system", "content": "Be brief. Be kind."}, {"role": "user", "content": "Hi there"}
    made = processor.chat_prompt(Chat([system, user], breakpoints=((0, 300.0), (2, 3600.0))))
    other = processor.chat_prompt(Chat([system, {"role": "user", "content": "Something else"}]))
    (num_system, first_s), (num_all, second_s) = made.pins
    assert (first_s, second_s) == (300.0, 3600.0)
    assert made.token_ids[:num_system] == other.token_ids[:num_system]
    assert made.token_ids[num_system] != other.token_ids[num_system]
    longer = processor.chat_prompt(Chat([system, user, {"role": "assistant", "content": "x"}, user]))
    assert made.token_ids[:num_all] == longer.token_ids[:num_all]
    assert num_system < num_all < len(made.token_ids)
    (request,) = processor.engine_requests("r", made, SamplingParams(max_tokens=4))
    assert request.pins == made.pins


def test_reasoning_is_budgeted_by_a_grammar(tmp_path: Path) -> None:
    path = qwen().write(tmp_path, "{{ messages[0].content }}<think>{{ reasoning_effort }}</think>")
    processor = Processor(Tokenizer.load(path), ChatTemplate.load(path), MAX_MODEL_LEN, VOCAB_SIZE)
    chat = Chat([{"role": "user", "content": "Hi"}], thinking=Thinking(7, param="p"))
    sampling = processor.constrained(SamplingParams(), processor.chat_prompt(chat), chat)
    assert sampling.grammar == GrammarSpec(GrammarKind.TEXT, "", "</think>", "p", 7, "<think>")
    opened = processor.constrained(SamplingParams(), Prompt([1], opening="<think>"), chat)
    assert opened.grammar is not None
    assert opened.grammar.opened_by == ""
    hard = Chat([{"role": "user", "content": "Hi"}], thinking=Thinking(effort="high", param="p"))
    text = processor.chat_prompt(hard).text
    assert text is not None
    assert "<think>high</think>" in text
    processor.close()


def test_degrees_of_reasoning_need_a_template_that_knows_them(processor: Processor) -> None:
    with pytest.raises(ValidationError, match="no degrees of reasoning") as refused:
        processor.chat_prompt(Chat([{"role": "user", "content": "Hi"}], thinking=Thinking(effort="low", param="p")))
    assert refused.value.param == "p"


def test_empty_prompts_are_refused(processor: Processor) -> None:
    with pytest.raises(ValidationError, match="empty"):
        processor.token_prompt([])
    with pytest.raises(ValidationError, match="empty"):
        processor.text_prompt("", add_special_tokens=False)
    assert processor.text_prompt("").token_ids == [processor.tokenizer.bos_token_id]


def test_a_prompt_without_room_is_refused_with_both_numbers(processor: Processor) -> None:
    assert len(processor.token_prompt([1] * (MAX_MODEL_LEN - 1)).token_ids) == MAX_MODEL_LEN - 1
    for num_tokens in (MAX_MODEL_LEN, MAX_MODEL_LEN + 100):
        with pytest.raises(ContextOverflowError, match=f"{num_tokens} tokens.*{MAX_MODEL_LEN}") as caught:
            processor.token_prompt([1] * num_tokens)
        assert caught.value.status == 400


def test_text_that_cannot_fit_is_refused_before_it_is_tokenized(
    processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor.tokenizer, "_encode", lambda text: pytest.fail("tokenized"))
    text = "x" * (processor.tokenizer.longest_token * (MAX_MODEL_LEN + 1))
    with pytest.raises(ContextOverflowError, match=f"at least {MAX_MODEL_LEN + 1} tokens.*{MAX_MODEL_LEN}"):
        processor.text_prompt(text)


def test_output_that_cannot_fit_is_refused_with_all_numbers(processor: Processor, prompt: Prompt) -> None:
    num_prompt = len(prompt.token_ids)
    room = MAX_MODEL_LEN - num_prompt
    (fitting,) = processor.engine_requests("r", prompt, SamplingParams(max_tokens=room))
    assert fitting.max_tokens == fitting.sampling.max_tokens == room
    with pytest.raises(ContextOverflowError) as caught:
        processor.engine_requests("r", prompt, SamplingParams(max_tokens=room + 1))
    for number in (num_prompt, room + 1, MAX_MODEL_LEN + 1, MAX_MODEL_LEN):
        assert str(number) in caught.value.message
    with pytest.raises(ValidationError, match="min_tokens"):
        processor.engine_requests("r", prompt, SamplingParams(min_tokens=room + 1))


def test_max_tokens_defaults_to_the_rest_of_the_context(processor: Processor, prompt: Prompt) -> None:
    (request,) = processor.engine_requests("r", prompt, SamplingParams())
    assert request.max_tokens == request.sampling.max_tokens == MAX_MODEL_LEN - len(prompt.token_ids)


def test_n_choices_share_the_prompt_and_differ_in_seed(processor: Processor, prompt: Prompt) -> None:
    requests = processor.engine_requests("r", prompt, SamplingParams(n=4, seed=7), priority=3, deadline_s=9.0)
    assert [request.request_id for request in requests] == ["r-0", "r-1", "r-2", "r-3"]
    assert all(request.prompt_token_ids is prompt.token_ids for request in requests)
    seeds = [request.sampling.seed for request in requests]
    assert seeds[0] == 7
    assert len(set(seeds)) == 4
    assert {request.sampling.n for request in requests} == {1}
    assert {(request.priority, request.deadline_s) for request in requests} == {(3, 9.0)}
    assert seeds == [r.sampling.seed for r in processor.engine_requests("s", prompt, SamplingParams(n=4, seed=7))]


def test_a_seed_is_drawn_when_none_is_given(processor: Processor, prompt: Prompt) -> None:
    seeds = {processor.engine_requests("r", prompt, SamplingParams())[0].sampling.seed for _ in range(8)}
    assert None not in seeds
    assert len(seeds) == 8


def test_derived_seeds_stay_in_bounds() -> None:
    lowest, highest = BOUNDS["seed"]
    for seed in (0, -1, int(lowest), 2**63 - 1):
        assert all(lowest <= derived_seed(seed, index) <= highest for index in range(128))


def test_stop_token_ids(processor: Processor, prompt: Prompt) -> None:
    eos = processor.tokenizer.eos_token_ids
    (request,) = processor.engine_requests("r", prompt, SamplingParams(stop_token_ids=(5, eos[0])))
    assert request.stop_token_ids == (*eos, 5)
    (ignoring,) = processor.engine_requests("r", prompt, SamplingParams(stop_token_ids=(5,), ignore_eos=True))
    assert ignoring.stop_token_ids == (5,)


def test_bad_words_become_token_sequences(processor: Processor, prompt: Prompt) -> None:
    words = ("fox", " fox", "quick brown", "水")
    (request,) = processor.engine_requests("r", prompt, SamplingParams(bad_words=words))
    sequences = request.sampling.bad_words_token_ids
    encode = processor.tokenizer.encode_user
    for text in ("fox", " fox", "quick brown"):
        assert tuple(encode(text, add_special_tokens=False)) in sequences
    assert tuple(encode("水", add_special_tokens=False)) in sequences
    with pytest.raises(ValidationError, match="bad_words"):
        processor.engine_requests("r", prompt, SamplingParams(bad_words=("  ",)))


def test_sampling_is_checked_against_the_models_vocabulary(processor: Processor, prompt: Prompt) -> None:
    with pytest.raises(ValidationError, match="stop_token_ids"):
        processor.engine_requests("r", prompt, SamplingParams(stop_token_ids=(VOCAB_SIZE,)))
    with pytest.raises(ValidationError, match="temperature"):
        processor.engine_requests("r", prompt, SamplingParams(temperature=float("nan")))


def test_output_state_gives_text(processor: Processor, prompt: Prompt) -> None:
    ids = processor.tokenizer.encode_user("jumps", add_special_tokens=False)
    state = processor.output_state(prompt, SamplingParams())
    result = state.process(RequestOutput("r-0", ids, finish_reason=FinishReason.LENGTH))
    assert (result.text, result.num_prompt_tokens, result.num_output_tokens) == (
        "jumps",
        len(prompt.token_ids),
        len(ids),
    )


async def test_long_prompts_are_tokenized_in_a_thread(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    encode: Callable[[str], list[int]] = processor.tokenizer._encode

    def recorded(text: str) -> list[int]:
        seen.append(threading.current_thread() is threading.main_thread())
        return encode(text)[:100]

    monkeypatch.setattr(processor.tokenizer, "_encode", recorded)
    await processor.prepare_text("short")
    await processor.prepare_text("x " * INLINE_CHARS)
    await processor.prepare_chat(Chat([{"role": "user", "content": "short"}]))
    await processor.prepare_chat(Chat([{"role": "user", "content": "x " * INLINE_CHARS}]))
    await processor.prepare_chat(Chat([{"role": "user", "content": "x"}], tools=[{"x" * INLINE_CHARS: [1, None]}]))
    assert seen == [True, False, True, False, False]


async def test_errors_come_out_of_the_thread(processor: Processor) -> None:
    with pytest.raises(ContextOverflowError):
        await processor.prepare_text("水 " * INLINE_CHARS)


@pytest.mark.parametrize(
    ("name", "shown"),
    [("qwen2.5-tools", '"arguments": {"level": 3}}'), ("qwen3-thinking", '"arguments": {"level":  3}}')],
)
def test_argument_text_is_read_where_the_template_does_not(tmp_path: Path, name: str, shown: str) -> None:
    path = qwen().write(tmp_path, TEMPLATES[name])
    made = Processor(Tokenizer.load(path), ChatTemplate.load(path), 4096, VOCAB_SIZE)
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"level":  3}'}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    text = made.chat_prompt(Chat(messages, tools=[WEATHER])).text
    made.close()
    assert text is not None
    assert shown in text
    assert call["function"]["arguments"] == '{"level":  3}', "the caller's messages stay as they are"


def test_argument_text_that_is_no_json_is_shown_as_it_is(processor: Processor, tmp_path: Path) -> None:
    path = qwen().write(tmp_path, TEMPLATES["qwen2.5-tools"])
    made = Processor(Tokenizer.load(path), ChatTemplate.load(path), 4096, VOCAB_SIZE)
    for arguments in ("{broken", "[1]", "[" * 100_000):
        call = {"function": {"name": "f", "arguments": arguments}}
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
        if len(arguments) < 100:
            assert f'"arguments": "{arguments}"' in (made.chat_prompt(Chat(messages)).text or "")
        else:
            with pytest.raises(ContextOverflowError):
                made.chat_prompt(Chat(messages))
    made.close()
