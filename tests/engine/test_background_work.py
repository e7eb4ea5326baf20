"""Background work that is left out of steps, and put back, draws what it draws undisturbed."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import msgspec

from checkpoints import write_checkpoint
from penstock.messages import EngineRequest
from penstock.messages.bounds import BACKGROUND_PRIORITY
from whole_engine import Finished, build, engine_config, request, run


def test_tokens_and_logprobs_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    config = engine_config(tmp_path, max_num_seqs=3, num_blocks=60)
    config = msgspec.structs.replace(config, scheduler=msgspec.structs.replace(config.scheduler, target_step_s=0.05))
    chance = random.Random(0)
    requests: list[EngineRequest] = []
    for number in range(42):
        prompt = [chance.randrange(100) for _ in range(chance.randint(1, 80))]
        one = request(f"r{number}", prompt, chance.randint(1, 40), temperature=0.8, seed=number, logprobs=0)
        is_background = number % 3 != 0
        requests.append(msgspec.structs.replace(one, priority=BACKGROUND_PRIORITY if is_background else 0))
    core = build(config)
    try:
        undisturbed = run(core, [msgspec.structs.replace(one, priority=0) for one in requests], 1)
        together = {one.request_id: Finished() for one in requests}
        others = [one for one in requests if one.priority == 0]
        for one in requests:
            assert one.priority == 0 or core.add(one) is None
        for turn in itertools.count():
            for output in core.step():
                together[output.request_id].token_ids += output.token_ids
                together[output.request_id].logprobs += output.logprobs or []
            for _ in range(2 if turn % 10 == 5 and others else 0):  # the background work has all rows
                assert core.add(others.pop()) is None
            core.scheduler.check()
            if not core.has_work():
                break
        assert core.stats().num_preemptions, "nobody had to give way"
    finally:
        core.close()
    for name, one in together.items():
        assert one.token_ids == undisturbed[name].token_ids
        assert one.logprobs == undisturbed[name].logprobs
