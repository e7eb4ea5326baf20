"""Which shapes are captured: only what is used often, in bounded number and memory, never too small for a step."""

from __future__ import annotations

import random

from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock.runner import graph_policy
from penstock.runner.graph_policy import (
    MAX_FAILURES,
    MAX_GRAPHS,
    MAX_MIXED_TOKENS,
    MIN_USES,
    STEPS_APART,
    GraphLimits,
    GraphPolicy,
    StepShape,
    padded_size,
    usual_shapes,
)

LIMITS = GraphLimits(max_num_seqs=256, max_num_tokens=2048, max_blocks=512)
limits = st.builds(GraphLimits, st.integers(1, 600), st.integers(600, 4096), st.integers(1, 9000))


@st.composite
def steps(draw: st.DrawFn, of: GraphLimits = LIMITS) -> StepShape:
    num_requests = draw(st.integers(1, of.max_num_seqs))
    num_tokens = draw(st.one_of(st.just(num_requests), st.integers(num_requests, of.max_num_tokens)))
    return StepShape(num_tokens, num_requests, draw(st.integers(1, of.max_blocks)))


def capture_all(policy: GraphPolicy, nbytes: int = 1) -> list[StepShape]:
    while (shape := policy.next_capture(is_idle=True)) is not None:
        policy.keep(shape, nbytes)
    return policy.captured


def use(policy: GraphPolicy, step: StepShape, times: int = MIN_USES) -> None:
    for _ in range(times):
        policy.find(step)


@settings(deadline=None)
@given(st.data(), limits)
def test_a_step_fits_the_shape_it_is_padded_to_and_the_engines_limits(data, within):
    step = data.draw(steps(within))
    shape = within.padded(step)
    if shape is None:
        assert step.num_tokens > (min(256, within.max_requests) if step.is_decode else MAX_MIXED_TOKENS // 2)
        return
    assert shape.holds(step)
    assert shape.is_decode == step.is_decode, "only a shape for longer shares launches their kernel"
    assert shape.num_requests <= within.max_num_seqs
    assert shape.num_tokens <= within.max_num_tokens
    assert shape.num_blocks <= within.max_blocks
    assert within.allows(shape)
    assert within.padded(shape) == shape


@given(st.integers(1, 4096))
def test_padding_is_bounded(count):
    padded = padded_size(count)
    assert count <= padded <= (2 * count if count <= 16 else max(count + 7, 1.25 * count))
    assert padded_size(padded) == padded


@settings(max_examples=25, deadline=None)
@given(st.lists(steps(), max_size=12), st.integers(0, 2**32), st.integers(1, 1 << 20))
@example([StepShape(18, 17, 1)], 0, 1)  # its own shape has 80 tokens, for 64 requests
def test_what_is_captured_was_used_often_and_what_is_found_was_captured(used, seed, nbytes):
    source = random.Random(seed)
    policy = GraphPolicy(LIMITS._replace(nbytes=1 << 22))
    uses: dict[StepShape, int] = {}
    for _ in range(150 if used else 0):
        step = source.choice(used)
        own = LIMITS.padded(step)
        found = policy.find(step)
        if own is not None:
            uses[own] = uses.get(own, 0) + 1
        if found is not None:
            assert found in policy.captured
            assert found.holds(step)
            assert found == own or found.num_tokens <= 2 * max(step.num_tokens, 8)
        shape = policy.next_capture(is_idle=source.random() < 0.1)
        if shape is not None:
            assert uses[shape] >= MIN_USES
            assert shape not in policy.captured
            assert shape == max(other for other in uses if uses[other] >= MIN_USES and other not in policy.captured)
            assert policy.nbytes <= policy.limits.nbytes, "what one more takes is known when it is there"
            policy.keep(shape, source.randrange(nbytes))
        assert len(policy.captured) <= MAX_GRAPHS


def test_captures_between_steps_are_far_apart_and_at_once_where_nobody_waits():
    policy = GraphPolicy(LIMITS)
    use(policy, StepShape(4, 4, 3), STEPS_APART // 2)
    assert policy.next_capture(is_idle=False) is None, "the first requests wait for nothing"
    use(policy, StepShape(20, 20, 3), STEPS_APART // 2)
    first = policy.next_capture(is_idle=False)
    assert first == StepShape(24, 24, 32)
    policy.keep(first, 1)
    assert policy.next_capture(is_idle=False) is None
    assert policy.next_capture(is_idle=True) == StepShape(4, 4, 32)
    use(policy, StepShape(4, 4, 3), STEPS_APART)
    assert policy.next_capture(is_idle=False) == StepShape(4, 4, 32)


def test_number_and_memory_are_bounded():
    many = GraphPolicy(LIMITS._replace(max_blocks=100_000), usual_shapes(LIMITS._replace(max_blocks=100_000)))
    for count in range(1, 257):
        for blocks in (1, 100, 500, 2000, 8000, 30_000):
            use(many, StepShape(count, count, blocks))
    assert len(capture_all(many)) == MAX_GRAPHS
    few = GraphPolicy(LIMITS._replace(nbytes=100))
    for count in range(1, 257):
        use(few, StepShape(count, count, 1))
    assert len(capture_all(few, nbytes=30)) == 3


def test_a_shape_that_failed_is_not_tried_again_and_after_some_none_is():
    policy = GraphPolicy(LIMITS)
    for count in range(1, 257):
        use(policy, StepShape(count, count, 1))
    tried = set()
    while (shape := policy.next_capture(is_idle=True)) is not None:
        assert shape not in tried
        tried.add(shape)
        policy.refuse(shape)
    assert len(tried) == MAX_FAILURES
    assert policy.find(StepShape(4, 4, 1)) is None


def test_a_step_may_run_in_a_somewhat_larger_shape_but_not_in_one_of_another_kind():
    policy = GraphPolicy(LIMITS, [StepShape(32, 32, 128)])
    assert capture_all(policy) == [StepShape(32, 32, 128)]
    assert policy.find(StepShape(20, 20, 5)) == StepShape(32, 32, 128)
    assert policy.find(StepShape(20, 20, 129)) is None
    assert policy.find(StepShape(9, 9, 5)) is None, "more than twice as large"
    assert policy.find(StepShape(20, 8, 5)) is None, "longer shares need a kernel that it does not launch"


def test_what_is_no_longer_used_is_forgotten(monkeypatch):
    monkeypatch.setattr(graph_policy, "_FORGET_STEPS", 40)
    policy = GraphPolicy(LIMITS)
    use(policy, StepShape(4, 4, 1), MIN_USES)
    use(policy, StepShape(300, 2, 1), 30)
    assert policy.next_capture(is_idle=True) is None


def test_what_a_package_names_is_checked():
    wrong = [(0, 0, 0), (-1, -1, 1), (3, 3, 32), (10**9, 10**9, 32), (4, 8, 32), (4, 4, 31)]
    policy = GraphPolicy(LIMITS, [StepShape(*each) for each in wrong] + [StepShape(4, 4, 32)])
    assert capture_all(policy) == [StepShape(4, 4, 32)]


@given(limits)
def test_the_usual_shapes_are_shapes(within):
    shapes = usual_shapes(within)
    assert 1 <= len(shapes) <= MAX_GRAPHS
    assert all(within.allows(shape) for shape in shapes)
