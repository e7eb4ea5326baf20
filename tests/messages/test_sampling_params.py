"""Every number on a request has a bound, and NaN or infinity never passes one."""

import math

import pytest

from penstock.base.errors import ValidationError
from penstock.messages import SamplingParams
from penstock.messages.bounds import BOUNDS, MAX_ENTRIES

SCALARS = [name for name in BOUNDS if name in SamplingParams.__struct_fields__ and name != "logit_bias"]


def test_the_defaults_are_valid() -> None:
    SamplingParams().validate()


@pytest.mark.parametrize("name", SCALARS)
def test_every_scalar_has_working_bounds(name: str) -> None:
    lowest, highest = BOUNDS[name]
    for value in (lowest - 1, highest * 2 + 1, math.nan, math.inf, -math.inf, 10**400):
        with pytest.raises(ValidationError) as caught:
            SamplingParams(**{name: value}).validate()
        assert caught.value.param == name
        assert caught.value.status == 400


def test_every_number_of_sampling_params_is_bounded() -> None:
    numbers = {
        name
        for name, default in zip(
            SamplingParams.__struct_fields__[-len(SamplingParams.__struct_defaults__) :],
            SamplingParams.__struct_defaults__,
            strict=True,
        )
        if (isinstance(default, int | float) or default is None) and not isinstance(default, bool)
    }
    assert numbers - {"grammar"} <= set(BOUNDS)  # no number: its length is bounded


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop": ("",)}, "stop"),
        ({"stop": ("a",) * (MAX_ENTRIES["stop"] + 1)}, "stop"),
        ({"stop": ("a" * (MAX_ENTRIES["stop_chars"] + 1),)}, "stop"),
        ({"logit_bias": {1: math.nan}}, "logit_bias"),
        ({"logit_bias": {500: 1.0}}, "logit_bias"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"top_p": 0.0}, "top_p"),
        ({"bad_words": ("",)}, "bad_words"),
    ],
)
def test_contradictions_and_excess_are_refused(fields: dict[str, object], param: str) -> None:
    with pytest.raises(ValidationError) as caught:
        SamplingParams(**fields).validate(vocab_size=100)
    assert caught.value.param == param
