"""The files of the bundled checkpoint: small, complete, and the same text to transformers, to the trainer and to us."""

import json

import pytest
from safetensors import safe_open
from tools.bundled_model import corpus
from tools.bundled_model.chat import CHAT_TEMPLATE

from penstock.assets import BUNDLED_MODEL
from penstock.frontend.chat_template import ChatTemplate
from penstock.frontend.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def conversations():
    return corpus.held_out(0, 6)


def test_it_fits_into_the_repository():
    assert sum(file.stat().st_size for file in BUNDLED_MODEL.iterdir()) <= 16 * 2**20


def test_the_model_card_names_the_held_out_figure_and_calls_it_a_demonstration():
    card = (BUNDLED_MODEL / "MODEL_CARD.md").read_text()
    assert "held-out" in card
    assert "demonstration" in card


def test_weights_are_tied_bfloat16():
    with safe_open(BUNDLED_MODEL / "model.safetensors", "pt") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118 - safe_open is no mapping
        assert {str(weights.get_tensor(name).dtype) for name in weights.keys()} == {"torch.bfloat16"}  # noqa: SIM118


def test_the_template_is_the_one_it_was_trained_with():
    assert json.loads((BUNDLED_MODEL / "tokenizer_config.json").read_text())["chat_template"] == CHAT_TEMPLATE


def test_transformers_renders_what_it_was_trained_on(conversations):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    for item in conversations:
        rendered = tokenizer.apply_chat_template(
            item.messages[:-1], tools=item.tools or None, add_generation_prompt=True, tokenize=False
        )
        assert rendered == item.prompt()


def test_our_frontend_renders_and_encodes_what_it_was_trained_on(conversations):
    from tokenizers import Tokenizer as Reference

    template, tokenizer = ChatTemplate.load(BUNDLED_MODEL), Tokenizer.load(BUNDLED_MODEL)
    reference = Reference.from_file(str(BUNDLED_MODEL / "tokenizer.json"))
    for item in conversations:
        prompt = template.render(item.messages[:-1], tools=item.tools or None, add_generation_prompt=True)
        assert prompt.text == item.prompt()
        assert tokenizer.encode_prompt(prompt) == reference.encode(item.prompt()).ids


def test_it_stops_at_the_end_of_a_turn():
    tokenizer = Tokenizer.load(BUNDLED_MODEL)
    assert tokenizer.eos_token_ids == (tokenizer.token_to_id("<|im_end|>"),)


def test_any_text_survives_the_tokenizer():
    tokenizer = Tokenizer.load(BUNDLED_MODEL)
    text = "Größe 漢字 🙂\tdef f(x):\n    return x  # 3.14"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
