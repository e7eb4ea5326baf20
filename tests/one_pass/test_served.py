"""`penstock serve` on an encoder: the official client's vectors are those of the Python API."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from langchain_openai import OpenAIEmbeddings

from checkpoints import write_checkpoint, write_tokenizer
from penstock import LLM

TEXTS = ["the quick brown fox", "jumps over", "the lazy dog and sings of rivers"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder")
    write_checkpoint(path, "bert", vocab_size=320)
    write_tokenizer(path, 320)
    return path


@pytest.fixture(scope="module")
def url(path: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "penstock.cli.main", "serve", str(path), "--port", "0", "--num-threads", "1"]
    process = subprocess.Popen([*command, "--served-model-name", "tiny"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if match := re.search(r"is served at (\S+)/v1", line):
            yield match[1]
            break
    process.terminate()
    assert process.wait(30) == 0


def test_the_official_client(url: str, path: Path) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    with LLM(str(path), num_threads=1) as llm:
        wanted = [one.vector for one in llm.embed(TEXTS)]
        cut = llm.embed(TEXTS[0], dimensions=8)[0].vector
        scores = llm.score(TEXTS[0], TEXTS)
    answer = client.embeddings.create(model="tiny", input=TEXTS)
    assert [one.embedding for one in answer.data] == wanted
    assert client.embeddings.create(model="tiny", input=TEXTS[0], dimensions=8).data[0].embedding == cut
    chain = OpenAIEmbeddings(model="tiny", base_url=f"{url}/v1", api_key="none", check_embedding_ctx_length=False)
    assert chain.embed_documents(TEXTS) == wanted
    body = {"model": "tiny", "query": TEXTS[0], "documents": TEXTS}
    ranked = httpx.post(f"{url}/v1/rerank", json=body).json()["results"]
    assert [one["relevance_score"] for one in ranked] == pytest.approx(sorted(scores, reverse=True))
    with pytest.raises(openai.BadRequestError, match="does not generate text; its tasks: embed, score, rerank"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}])
    with pytest.raises(openai.BadRequestError, match="at most 130"):
        client.embeddings.create(model="tiny", input=[5] * 131)
    assert client.embeddings.create(model="tiny", input=[5] * 130).usage.prompt_tokens == 130
