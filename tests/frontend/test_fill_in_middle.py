"""A gap's prompt is what transformers' own tokenizer makes of the models' documented text."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_checkpoints import TinyCheckpoint, llama3, qwen
from tokenizers import AddedToken
from transformers import AutoTokenizer

from penstock.base.errors import ContextOverflowError, ValidationError
from penstock.frontend.chat_template import ChatTemplate
from penstock.frontend.fill_in_middle import MARKERS, Gap
from penstock.frontend.processor import Processor
from penstock.frontend.text_files import TextFiles
from penstock.frontend.tokenizer import Tokenizer

GAPS = [Gap("def flow(rate):\n    ", "\n    return head"), Gap("", "after"), Gap("before 1", ""), Gap("é🙂", " x\n")]


def processor(checkpoint: TinyCheckpoint, path: Path) -> Processor:
    files = TextFiles.read(checkpoint.write(path))
    return Processor(Tokenizer.from_files(files), ChatTemplate.from_files(files), 64, 1000)


@pytest.mark.parametrize("markers", MARKERS, ids=lambda markers: markers[0])
@pytest.mark.parametrize("family", [qwen, llama3])
@pytest.mark.parametrize("special", [False, True])
def test_prompts_are_those_of_the_reference(
    family: type, markers: tuple[str, ...], special: bool, tmp_path: Path
) -> None:
    checkpoint = family()
    checkpoint.tokenizer.add_tokens([AddedToken(one, special=special, normalized=False) for one in markers])
    ours = processor(checkpoint, tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    before, behind, between = markers
    for gap in GAPS:
        for begins in (False, True):
            documented = f"{before}{gap.before}{behind}{gap.after}{between}"
            prompt = ours.gap_prompt(gap, add_special_tokens=begins)
            assert prompt.token_ids == reference.encode(documented, add_special_tokens=begins)


def test_markers_in_a_users_text_stay_text(tmp_path: Path) -> None:
    checkpoint = qwen()
    checkpoint.tokenizer.add_tokens(list(MARKERS[0]))
    ours = processor(checkpoint, tmp_path)
    token_ids = ours.gap_prompt(Gap(MARKERS[0][2], MARKERS[0][1])).token_ids
    markers = [checkpoint.tokenizer.token_to_id(one) for one in MARKERS[0]]
    assert [token_id for token_id in token_ids if token_id in markers] == markers


def test_a_model_without_markers_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="suffix: this model has no tokens") as raised:
        processor(qwen(), tmp_path).gap_prompt(Gap("a", "b"))
    assert raised.value.param == "suffix"


def test_texts_beyond_the_context_are_refused(tmp_path: Path) -> None:
    checkpoint = qwen()
    checkpoint.tokenizer.add_tokens(list(MARKERS[0]))
    with pytest.raises(ContextOverflowError):
        processor(checkpoint, tmp_path).gap_prompt(Gap("a b " * 20, "c d " * 20))
