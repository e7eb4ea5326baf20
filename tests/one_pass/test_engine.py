"""One-pass requests through a whole engine against transformers: vectors and scores, however they are scheduled."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import write_checkpoint
from penstock.config.model import ModelConfig
from penstock.engine.core import EngineCore
from penstock.loader import read_model_config
from penstock.messages import EngineRequest, FinishReason, PoolingParams, SamplingParams
from whole_engine import build, engine_config, request, run

EMBED = PoolingParams(kind="embed")
CLASSIFY = PoolingParams(kind="classify")


def core_of(path: Path, **options: Any) -> EngineCore:
    return build(engine_config(path, **options))


def one_pass(request_id: str, prompt: Sequence[int], pooling: PoolingParams = EMBED) -> EngineRequest:
    return EngineRequest(
        request_id=request_id, prompt_token_ids=list(prompt), sampling=SamplingParams(), max_tokens=1, pooling=pooling
    )


def vectors(core: EngineCore, requests: Sequence[EngineRequest], concurrency: int = 16) -> list[np.ndarray]:
    finished = run(core, requests, concurrency)
    for one in finished.values():
        assert one.last is not None
        assert (one.finish_reason, one.token_ids, one.last.num_output_tokens) == (FinishReason.STOP, [], 0)
    return [np.frombuffer(finished[one.request_id].last.pooled, dtype="<f4") for one in requests]


def prompts(count: int, longest: int, seed: int = 3) -> list[list[int]]:
    rng = random.Random(seed)
    shared = [rng.randrange(3, 211) for _ in range(40)]
    texts = [[rng.randrange(3, 211) for _ in range(rng.randint(1, longest))] for _ in range(count)]
    return [shared[: longest - 1] + text[:1] if index % 4 == 1 else text for index, text in enumerate(texts)]


def write_pooling(path: Path, mode: str, *, normalize: bool = True, **limits: int) -> None:
    """sentence-transformers' files."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")][: 3 if normalize else 2]
    modules = [
        {"idx": i, "name": str(i), "path": folder, "type": f"sentence_transformers.models.{kind}"}
        for i, (folder, kind) in enumerate(kinds)
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 60, mode: True}))
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 128, **limits}))


@torch.inference_mode()
def states_of(model: Any, prompt: list[int], **inputs: Any) -> torch.Tensor:
    """[length, D] of a transformers model's body."""
    return getattr(model, "model", model)(torch.tensor([prompt]), **inputs).last_hidden_state[0]


def unit(vector: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(vector.double(), dim=0).numpy()


@pytest.mark.parametrize("kernels", ["reference", "native"])
@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
def test_encoders_equal_transformers(family: str, kernels: str, tmp_path: Path) -> None:
    theirs = write_checkpoint(tmp_path, family, type_vocab_size=2 if family == "bert" else 1)
    texts = prompts(24, 120)
    core = core_of(tmp_path, kernels=kernels, max_num_batched_tokens=130, max_model_len=128)
    got = vectors(core, [one_pass(str(i), text) for i, text in enumerate(texts)])
    for text, vector in zip(texts, got, strict=True):
        np.testing.assert_allclose(vector, unit(states_of(theirs, text).mean(0)), atol=2e-6)
    assert core.stats().num_blocks == 0
    core.close()


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("mode", ["pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_lasttoken"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_sentence_transformers_files_are_honoured(family: str, mode: str, prefix: bool, tmp_path: Path) -> None:
    """prefix: the checkpoint is of a model with a head, so that its body's names have a prefix."""
    heads = {"bert": ("ForMaskedLM", "Model"), "llama": ("ForCausalLM", "Model")}[family]
    theirs = write_checkpoint(tmp_path, family, head=heads[0] if prefix else heads[1])
    write_pooling(tmp_path, mode, normalize=False)
    body = theirs.base_model
    text = prompts(1, 90, seed=7)[0]
    states = states_of(body, text)
    wanted = {"cls": states[0], "mean": states.mean(0), "last": states[-1]}
    core = core_of(tmp_path, max_model_len=128)
    params = [
        EMBED,
        PoolingParams(kind="embed", normalize=True),
        PoolingParams(kind="embed", dimensions=7, normalize=True),
    ]
    plain, whole, cut = vectors(core, [one_pass(str(i), text, one) for i, one in enumerate(params)])
    state = next(wanted[name] for name in wanted if name in mode)
    np.testing.assert_allclose(plain, state.numpy(), atol=2e-5)
    np.testing.assert_allclose(whole, unit(state), atol=2e-6)
    np.testing.assert_allclose(cut, unit(state[:7]), atol=3e-6)
    assert read_model_config(tmp_path).tasks == ("embed", "score", "rerank")
    assert read_model_config(tmp_path).max_context_len == 128
    core.close()


SCHEDULES: dict[str, dict[str, Any]] = {
    "whole": {"prefix_caching": False},
    "chunked": {"prefix_caching": False, "max_num_batched_tokens": 40},
    "prefix hits": {"max_num_batched_tokens": 48},
    "few blocks": {"num_blocks": 24, "max_num_batched_tokens": 64},
}


@pytest.mark.parametrize("mode", ["pooling_mode_mean_tokens", "pooling_mode_lasttoken", "pooling_mode_cls_token"])
def test_a_decoders_vectors_do_not_depend_on_the_schedule(mode: str, tmp_path: Path) -> None:
    theirs = write_checkpoint(tmp_path, "qwen3", head="Model")
    write_pooling(tmp_path, mode, max_seq_length=400)
    texts = prompts(24, 100)
    requests = [one_pass(str(i), text) for i, text in enumerate(texts)]
    by_schedule = []
    for options in SCHEDULES.values():
        core = core_of(tmp_path, **options)
        by_schedule.append(vectors(core, requests))
        core.close()
    for vector, text in zip(by_schedule[0], texts, strict=True):
        states = states_of(theirs, text)
        state = states.mean(0) if "mean" in mode else states[-1] if "last" in mode else states[0]
        np.testing.assert_allclose(vector, unit(state), atol=3e-6)
    for other in by_schedule[1:]:
        assert all(np.array_equal(left, right) for left, right in zip(by_schedule[0], other, strict=True))


def test_generation_and_vectors_share_steps(tmp_path: Path) -> None:
    """A generating model gives vectors beside tokens, and neither changes the other."""
    theirs = write_checkpoint(tmp_path, "llama")
    texts = prompts(16, 60)
    core = core_of(tmp_path, max_num_batched_tokens=64)
    alone = run(core, [request(f"g{i}", text, 8) for i, text in enumerate(texts)], 1)
    mixed = [
        one_pass(f"e{i}", text) if i % 2 else request(f"g{i}", text, 8, logprobs=1, prompt_logprobs=0)
        for i, text in enumerate(texts)
    ]
    together = run(core, mixed, 16)
    for index, text in enumerate(texts):
        if index % 2:
            vector = np.frombuffer(together[f"e{index}"].last.pooled, dtype="<f4")
            np.testing.assert_allclose(vector, unit(states_of(theirs, text)[-1]), atol=3e-6)
        else:
            assert together[f"g{index}"].token_ids == alone[f"g{index}"].token_ids
    core.close()


CLASSIFIERS: dict[str, tuple[dict[str, Any], Any]] = {
    "softmax": ({"num_labels": 3}, lambda logits: logits.softmax(-1)),
    "one label": ({"num_labels": 1}, torch.sigmoid),
    "regression": ({"num_labels": 1, "problem_type": "regression"}, lambda logits: logits),
    "several at once": ({"num_labels": 4, "problem_type": "multi_label_classification"}, torch.sigmoid),
    "named": (
        {"num_labels": 1, "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
        lambda logits: logits,
    ),
}


@pytest.mark.parametrize("case", CLASSIFIERS)
@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "llama", "mistral", "qwen2", "qwen3"])
@torch.inference_mode()
def test_classifiers_equal_transformers(family: str, case: str, tmp_path: Path) -> None:
    if case != "softmax" and family not in ("bert", "llama"):
        pytest.skip("the activation is the same code for all families")
    changes, activation = CLASSIFIERS[case]
    theirs = write_checkpoint(tmp_path, family, head="ForSequenceClassification", **changes)
    texts = prompts(8, 100)
    core = core_of(tmp_path, max_num_batched_tokens=128, max_model_len=128)
    raw = PoolingParams(kind="classify", activate=False)
    requests = [one_pass(f"{kind}{i}", text, params) for i, text in enumerate(texts)
                for kind, params in (("p", CLASSIFY), ("r", raw))]  # fmt: skip
    got = dict(zip((one.request_id for one in requests), vectors(core, requests), strict=True))
    for index, text in enumerate(texts):
        logits = theirs(torch.tensor([text])).logits[0]
        np.testing.assert_allclose(got[f"r{index}"], logits.numpy(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(got[f"p{index}"], activation(logits).numpy(), rtol=1e-4, atol=1e-4)
    config = read_model_config(tmp_path)
    assert config.tasks == (("classify", "score", "rerank") if len(config.pooler.labels) == 1 else ("classify",))
    core.close()


@torch.inference_mode()
def test_the_two_texts_of_a_pair(tmp_path: Path) -> None:
    theirs = write_checkpoint(tmp_path, "bert", head="ForSequenceClassification", num_labels=1)
    text, start = prompts(1, 100, seed=9)[0], 5
    types = [[int(position >= start) for position in range(len(text))]]
    wanted = theirs(torch.tensor([text]), token_type_ids=torch.tensor(types)).logits[0].sigmoid()
    core = core_of(tmp_path, max_model_len=128)
    in_pairs = PoolingParams(kind="classify", second_text_start=start)
    [pair, plain] = vectors(core, [one_pass("pair", text, in_pairs), one_pass("plain", text, CLASSIFY)])
    np.testing.assert_allclose(pair, wanted.numpy(), atol=1e-5)
    assert abs(pair[0] - plain[0]) > 1e-4
    core.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str, tmp_path: Path) -> None:
    theirs = write_checkpoint(tmp_path, "bert", dtype=dtype)
    text = prompts(1, 100, seed=2)[0]
    core = core_of(tmp_path, dtype="bfloat16", max_model_len=128)
    [vector] = vectors(core, [one_pass("a", text)])
    assert float(vector @ unit(states_of(theirs, text).mean(0))) > 0.995
    core.close()


def test_refusals(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "bert")
    core = core_of(tmp_path, max_num_batched_tokens=100, max_model_len=128)
    for refused, code in (
        (one_pass("long", [5] * 101), "context_length_exceeded"),
        (request("chat", [5, 6], 4), "invalid_request"),
    ):
        output = core.add(refused)
        assert output is not None
        assert output.error is not None
        assert (output.error.status, output.error.code) == (400, code)
    assert core.add(one_pass("fits", [5] * 100)) is None
    assert core.add(one_pass("bad", [5] * 3, CLASSIFY)) is None
    outputs = {}
    while core.has_work():
        outputs.update({output.request_id: output for output in core.step()})
    assert outputs["fits"].pooled is not None
    assert outputs["bad"].error.status == 400
    core.scheduler.check()
    core.close()


def test_aborted_and_expired_requests_leave_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "bert")
    core = core_of(tmp_path, max_num_batched_tokens=100, max_model_len=100, max_num_seqs=2)
    for index in range(6):
        assert core.add(one_pass(str(index), [7] * 60)) is None
    core.step()
    ended = core.abort(["0", "4"])
    assert [output.finish_reason for output in ended] == [FinishReason.ABORT] * 2
    outputs = [output for _ in range(20) if core.has_work() for output in core.step()]
    assert sorted(output.request_id for output in outputs) == ["1", "2", "3", "5"]
    core.scheduler.check()
    core.close()


def test_config_of_an_encoder(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "xlm-roberta", type_vocab_size=1)
    config = ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert (config.architecture, config.first_position, config.max_context_len) == ("XLMRobertaModel", 2, 128)
    assert (config.is_encoder, config.pooler.pooling) == (True, "mean")
