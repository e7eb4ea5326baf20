"""Hostile grammars cost their sender an error within a limit, and nobody else anything."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from structured.hostile import hostile_specs, slow_schema
from vocabularies import small_vocabulary

from penstock.messages import GrammarSpec
from penstock.structured.backend import GrammarError
from penstock.structured.prover import GRACE_S, GrammarProver
from penstock.structured.worker import MAX_TIME_S


@pytest.fixture(scope="module")
def prover() -> Iterator[GrammarProver]:
    prover = GrammarProver(small_vocabulary())
    prover.start()
    yield prover
    process = prover._process
    assert process is not None
    prover.close()
    assert process.returncode is not None


def test_hostile_grammars_end_within_the_limit_and_the_worker_lives(prover: GrammarProver) -> None:
    assert prover._process is not None
    pid = prover._process.pid
    for spec in itertools.islice(hostile_specs(seed=7), 16):
        started_s = time.monotonic()
        with pytest.raises(GrammarError):
            prover.prove(spec)
        assert time.monotonic() - started_s < MAX_TIME_S + GRACE_S
    assert prover._process.pid == pid
    assert prover.prove(GrammarSpec.json_object()).num_closing_tokens == 2
    _, alive = psutil.wait_procs(psutil.Process(pid).children(), timeout=5)
    assert not alive


def test_what_takes_too_long_is_killed(prover: GrammarProver) -> None:
    with pytest.raises(GrammarError, match="seconds of processor time"):
        prover.prove(slow_schema())


def test_several_threads_may_prove_at_once(prover: GrammarProver) -> None:
    specs = [GrammarSpec.regex(f"[a-z]{{{count}}}") for count in range(1, 13)]
    with ThreadPoolExecutor(4) as threads:
        proofs = list(threads.map(prover.prove, specs))
    assert [proof.num_closing_tokens is not None for proof in proofs] == [True] * 12


def test_a_worker_that_was_killed_is_replaced(prover: GrammarProver) -> None:
    assert prover._process is not None
    pid = prover._process.pid
    os.kill(pid, signal.SIGKILL)
    prover._process.wait()
    assert prover.prove(GrammarSpec.choice(["a"])).text
    assert prover._process.pid != pid
