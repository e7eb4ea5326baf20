"""Vectors, scores and labels through the Python API, sync and async, and the async generation beside them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints import write_checkpoint, write_tokenizer
from penstock import LLM, AsyncLLM, SamplingParams
from penstock.base.errors import ContextOverflowError, ValidationError
from penstock.frontend.one_pass import UnsupportedTaskError
from penstock.messages import FinishReason

TEXTS = ["the quick brown fox", "jumps over", "the lazy dog and sings of rivers"]
SMALL = {"num_threads": 1, "max_num_seqs": 4}


def encoder(path: Path, head: str = "Model", **config: object) -> Path:
    write_checkpoint(path, "bert", head=head, vocab_size=320, **config)
    write_tokenizer(path, 320)
    return path


def test_vectors_are_the_same_from_texts_and_ids(tmp_path: Path) -> None:
    with LLM(str(encoder(tmp_path)), **SMALL) as llm:
        seen: list[tuple[int, int]] = []
        vectors = [one.vector for one in llm.embed(TEXTS, on_progress=lambda done, total: seen.append((done, total)))]
        assert seen[-1] == (3, 3)
        ids = [llm._processor.tokenizer.encode(text, add_special_tokens=True) for text in TEXTS]
        assert [one.vector for one in llm.embed(ids)] == vectors
        [alone] = llm.embed(TEXTS[1], dimensions=5)
        np.testing.assert_allclose(np.linalg.norm(alone.vector), 1, atol=1e-6)
        cosine = np.dot(vectors[0], vectors[1])
        np.testing.assert_allclose(llm.score(TEXTS[0], TEXTS[1:])[0], cosine, atol=1e-6)
        ranked = llm.rerank(TEXTS[0], TEXTS, top_n=2)
        assert (ranked[0].index, ranked[0].document, len(ranked)) == (0, TEXTS[0], 2)


def test_what_a_model_is_not_for_is_refused_by_name(tmp_path: Path) -> None:
    with LLM(str(encoder(tmp_path)), **SMALL) as llm:
        with pytest.raises(UnsupportedTaskError, match="does not generate text; its tasks: embed, score, rerank"):
            llm.generate("the", SamplingParams(max_tokens=1))
        with pytest.raises(UnsupportedTaskError, match="does not classify"):
            llm.classify("the")
        with pytest.raises(ValidationError, match="between 1 and 60"):
            llm.embed("the", dimensions=61)
        with pytest.raises(ContextOverflowError, match="at most 130"):
            llm.embed([[5] * 131])
        with pytest.raises(ValidationError, match="empty"):
            llm.embed("")
        with pytest.raises(ValidationError, match="cannot be paired"):
            llm.score(["a", "b"], ["c"])
        assert llm.embed([[5] * 131], truncate=True) == llm.embed([[5] * 130])


@torch.inference_mode()
def test_a_cross_encoder_reads_both_texts(tmp_path: Path) -> None:
    path = encoder(tmp_path, "ForSequenceClassification", num_labels=1)
    with LLM(str(path), **SMALL) as llm:
        scores = llm.score(TEXTS[0], TEXTS)
        assert [one.index for one in llm.rerank(TEXTS[0], TEXTS)] == sorted(range(3), key=lambda i: -scores[i])
        assert len(set(scores)) == 3
        assert all(0 < score < 1 for score in scores)
        with pytest.raises(UnsupportedTaskError):
            llm.embed("the")


def test_labels(tmp_path: Path) -> None:
    path = encoder(tmp_path, "ForSequenceClassification", id2label={0: "calm", 1: "wild", 2: "deep"})
    with LLM(str(path), **SMALL) as llm:
        for verdict in llm.classify(TEXTS):
            assert list(verdict.scores) == ["calm", "wild", "deep"]
            assert sum(verdict.scores.values()) == pytest.approx(1)
            assert verdict.scores[verdict.label] == max(verdict.scores.values())
        assert llm.ready.labels == ("calm", "wild", "deep")


async def test_the_async_model_gives_what_the_sync_one_gives(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, vocab_size=320, tokenizer=True, max_position_embeddings=256)
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, n=2)
    messages = [{"role": "user", "content": "sing"}]
    with LLM(str(tmp_path), max_memory=200 << 20, **SMALL) as llm:
        wanted, chatted = llm.generate(TEXTS, greedy), llm.chat(messages, greedy)[0]
        vectors = llm.embed(TEXTS)
    async with await AsyncLLM.start(str(tmp_path), max_memory=200 << 20, **SMALL) as model:
        got = await asyncio.gather(*(model.generate(text, greedy) for text in TEXTS))
        for one, other in zip(got, wanted, strict=True):
            assert [c.text for c in one.outputs] == [c.text for c in other.outputs]
        assert (await model.chat(messages, greedy)).outputs[0].text == chatted.outputs[0].text
        assert await model.embed(TEXTS) == vectors
        assert [one.index for one in await model.rerank(TEXTS[2], TEXTS, top_n=1)] == [2]
        one = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        pieces = [piece async for piece in model.stream(TEXTS[0], one)]
        assert "".join(piece.text for piece in pieces) == wanted[0].outputs[0].text
        assert pieces[-1].finish_reason is FinishReason.LENGTH

        endless = asyncio.create_task(
            model.generate("the", SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True))
        )
        await asyncio.sleep(0.02)
        endless.cancel()
        with pytest.raises(asyncio.CancelledError):
            await endless
        assert (await model.generate(TEXTS[0], one)).outputs[0].text == wanted[0].outputs[0].text
        with pytest.raises(UnsupportedTaskError):
            await model.classify("the")
