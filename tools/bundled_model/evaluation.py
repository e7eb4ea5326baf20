"""Exact match on the held-out set, with greedy decoding by transformers or by Penstock itself."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tools.bundled_model import corpus
from tools.bundled_model.chat import Conversation
from tools.bundled_model.tokenizer import IM_END

MAX_NEW_TOKENS = 160
Generate = Callable[[list[str]], list[str]]
"""Prompts -> the text of the answers, up to but without the end marker."""


def transformers_generate(directory: Path, batch: int = 8) -> Generate:
    """Greedy decoding of the checkpoint in `directory`, in the dtype of its weights."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model: Any = LlamaForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)

    def generate(prompts: list[str]) -> list[str]:
        answers: dict[int, str] = {}
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        for start in range(0, len(order), batch):
            places = order[start : start + batch]
            inputs = tokenizer([prompts[place] for place in places], return_tensors="pt", padding=True)
            with torch.inference_mode():
                output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            for place, row in zip(places, output[:, inputs["input_ids"].shape[1] :], strict=True):
                answers[place] = answer_of(str(tokenizer.decode(row)))
        return [answers[place] for place in range(len(prompts))]

    return generate


def penstock_generate(directory: Path, threads: int) -> Generate:
    """Greedy decoding by our own engine, all prompts at once."""
    from penstock import LLM, SamplingParams

    def generate(prompts: list[str]) -> list[str]:
        parameters = SamplingParams(temperature=0.0, max_tokens=MAX_NEW_TOKENS, skip_special_tokens=False)
        with LLM(str(directory), num_threads=threads) as llm:
            generations = llm.generate(prompts, parameters, parse_control_tokens=True)
        outputs = [generation.outputs[0] for generation in generations]
        return [answer_of(output.text + IM_END * (output.finish_reason == "stop")) for output in outputs]

    return generate


def answer_of(text: str) -> str:
    """The part of a decoded continuation before the end marker; an answer that never ends is marked as wrong."""
    answer, ended, _ = text.partition(IM_END)
    return answer if ended else answer + "<never ended>"


def evaluate(generate: Generate, seed: int, per_maker: int, show: int) -> str:
    """A table of exact match per category; `show` wrong answers follow."""
    items = corpus.held_out(seed, per_maker)
    began = time.monotonic()
    answers = generate([item.prompt() for item in items])
    return table(items, answers, show) + f"\n({time.monotonic() - began:.0f} s)"


def table(items: list[Conversation], answers: list[str], show: int = 0) -> str:
    """Exact match per category and in all, as text."""
    counts: Counter[str] = Counter()
    right: Counter[str] = Counter()
    wrong = []
    for item, answer in zip(items, answers, strict=True):
        counts[item.category] += 1
        right[item.category] += answer == item.answer()
        if answer != item.answer():
            wrong.append(f"--- {item.category}\n{item.prompt()}[wanted] {item.answer()}\n[got]    {answer}")
    lines = [
        f"{name:12} {right[name]:4} of {count:4}  {right[name] / count:7.1%}" for name, count in sorted(counts.items())
    ]
    total = sum(counts.values())
    lines.append(f"{'all':12} {right.total():4} of {total:4}  {right.total() / total:7.1%}")
    return "\n".join([*lines, *wrong[:show]])
