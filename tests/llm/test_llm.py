"""The offline API: text in, text out, in order, with errors before anything runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoints import write_checkpoint
from penstock import LLM, SamplingParams
from penstock.base.errors import CheckpointError, ConfigError, ContextOverflowError, ValidationError
from penstock.messages import FinishReason


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, vocab_size=320, tokenizer=True, max_position_embeddings=256)
    with LLM(str(path), max_num_seqs=4, num_threads=1) as llm:
        yield llm


GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def test_many_prompts_come_back_in_order_and_equal_to_one_by_one(llm: LLM) -> None:
    prompts = [f"the river number {index} sings" for index in range(20)]
    seen: list[tuple[int, int]] = []
    together = llm.generate(prompts, GREEDY, on_progress=lambda done, total: seen.append((done, total)))
    assert [generation.prompt for generation in together] == prompts
    assert sorted(seen) == [(done, 20) for done in range(1, 21)]
    for prompt, generation in zip(prompts, together, strict=True):
        (alone,) = llm.generate(prompt, GREEDY)
        assert alone.outputs[0].token_ids == generation.outputs[0].token_ids
        assert alone.outputs[0].text == generation.outputs[0].text
        assert generation.outputs[0].finish_reason is FinishReason.LENGTH


def test_token_ids_n_and_logprobs(llm: LLM) -> None:
    sampling = SamplingParams(
        temperature=1.0, seed=3, n=3, max_tokens=6, ignore_eos=True, logprobs=2, prompt_logprobs=0
    )
    (generation,) = llm.generate([10, 11, 12], sampling)
    assert generation.prompt is None
    assert generation.prompt_logprobs is not None
    assert len(generation.prompt_logprobs) == 3
    assert len({tuple(completion.token_ids) for completion in generation.outputs}) > 1
    for completion in generation.outputs:
        assert completion.logprobs is not None
        assert [entry.token.token_id for entry in completion.logprobs] == completion.token_ids
        assert all(len(entry.top) == 2 for entry in completion.logprobs)
    (again,) = llm.generate([10, 11, 12], sampling)
    assert [c.token_ids for c in again.outputs] == [c.token_ids for c in generation.outputs]


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    (full,) = llm.generate("the quick", GREEDY)
    text = full.outputs[0].text
    stop = text[len(text) // 2 :][:2]
    (cut,) = llm.generate("the quick", SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop=(stop,)))
    assert cut.outputs[0].text == text[: text.index(stop)]
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == (FinishReason.STOP, stop)


def test_chat_uses_the_template(llm: LLM) -> None:
    (generation,) = llm.chat([{"role": "user", "content": "sing"}], GREEDY)
    assert generation.prompt == "<|im_start|>user\nsing<|im_end|>\n<|im_start|>assistant\n"
    both = llm.chat([[{"role": "user", "content": "sing"}], [{"role": "user", "content": "jump"}]], GREEDY)
    assert both[0].outputs[0].token_ids == generation.outputs[0].token_ids


def test_errors_come_before_anything_runs(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(ContextOverflowError, match="256"):
        llm.generate(["fine", "long " * 2000], GREEDY)
    with pytest.raises(ValidationError):
        llm.generate("", GREEDY)
    with pytest.raises(ValidationError):
        llm.generate("x", SamplingParams(temperature=float("nan")))
    with pytest.raises(ConfigError, match="2 sampling_params"):
        llm.generate(["a", "b", "c"], [GREEDY, GREEDY])
    with pytest.raises(ConfigError, match="max_seqs"):
        LLM(str(tmp_path), max_seqs=3)
    with pytest.raises(CheckpointError):
        LLM(str(tmp_path))


def test_answering_imports_no_compiler() -> None:
    """Each takes seconds and a hundred megabytes, in the first step of a server that is ready."""
    program = (
        "import sys\nfrom penstock import LLM, SamplingParams\n"
        "with LLM(max_num_seqs=2, max_memory=256 << 20) as llm: llm.generate('Hello', SamplingParams(max_tokens=4))\n"
        "print('HEAVY', sorted({'torch._dynamo', 'torch._inductor', 'triton', 'sympy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("HEAVY []\n"), done.stdout[-300:]
