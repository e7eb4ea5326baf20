"""How tokens are chosen: the one set of sampling parameters that every protocol becomes."""

from __future__ import annotations

import msgspec

from penstock.base.errors import ValidationError
from penstock.messages.bounds import BOUNDS, MAX_ENTRIES
from penstock.messages.grammar import GrammarSpec


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling parameters of one request. Names and meanings follow vLLM's.

    temperature: 0 means greedy. top_k: 0 means off. top_p: 1 means off. min_p: 0 means off.
    seed: with a seed, the same request gives the same tokens in any batch; None draws one from the system.
    logprobs: None for none, else how many alternatives beside the chosen token (0: the chosen token alone).
    max_tokens: None means "to the end of the context"; it is resolved before the engine sees it.
    bad_words_token_ids: filled in by the frontend from `bad_words`; sequences the output may not contain.
    grammar: what the output has to look like.
    top_n_sigma: 0 means off. typical_p: 1 means off. xtc_probability, dynatemp_range, dry_multiplier,
    mirostat: 0 means off; mirostat is 0 or 2.
    dry_breaker_token_ids: filled in by the frontend from dry_sequence_breakers: the tokens that hold one of them.
    Raises ValidationError from `validate()`, naming the field.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    top_n_sigma: float = 0.0
    typical_p: float = 1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    dry_breaker_token_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    grammar: GrammarSpec | None = None

    def validate(self, vocab_size: int | None = None) -> None:
        """Checks every bound. vocab_size: also checks token ids against it."""
        for name in _SCALARS:
            value = getattr(self, name)
            if value is not None:
                check_bound(name, value)
        self._check_shares()
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValidationError(
                f"min_tokens ({self.min_tokens}) exceeds max_tokens ({self.max_tokens}).", param="min_tokens"
            )
        self._validate_grammar()
        for name in ("stop", "bad_words", "dry_sequence_breakers"):
            _check_strings(name, getattr(self, name))
        for name in ("stop_token_ids", "logit_bias"):
            if len(getattr(self, name)) > MAX_ENTRIES[name]:
                raise ValidationError(f"{name} has more than {MAX_ENTRIES[name]} entries.", param=name)
        for value in self.logit_bias.values():
            check_bound("logit_bias", value)
        if vocab_size is not None:
            for name in ("stop_token_ids", "logit_bias"):
                for token_id in getattr(self, name):
                    if not 0 <= token_id < vocab_size:
                        raise ValidationError(
                            f"{name} names token {token_id}, outside the vocabulary of {vocab_size}.", param=name
                        )

    def _check_shares(self) -> None:
        for name in ("top_p", "typical_p"):
            if getattr(self, name) <= 0.0:
                raise ValidationError(f"{name} must be above 0.", remedy="Use 1 to switch it off.", param=name)
        if self.mirostat == 1:
            raise ValidationError("mirostat must be 0 or 2.", remedy="Its first version is not here.", param="mirostat")

    def _validate_grammar(self) -> None:
        if self.grammar is None:
            return
        self.grammar.validate()
        if self.ignore_eos:
            raise ValidationError(
                "ignore_eos cannot be combined with a grammar: at its end there is nothing left to generate.",
                param="ignore_eos",
            )


_SCALARS = (
    "n", "temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "top_n_sigma", "typical_p", "xtc_probability", "xtc_threshold", "dynatemp_range", "dynatemp_exponent", "mirostat",
    "mirostat_tau", "mirostat_eta", "dry_multiplier", "dry_base", "dry_allowed_length", "seed", "logprobs",
    "prompt_logprobs", "max_tokens", "min_tokens",
)  # fmt: skip


def check_bound(name: str, value: float) -> None:
    """Raises ValidationError when `value` is not finite or outside BOUNDS[name]."""
    lowest, highest = BOUNDS[name]
    if not lowest <= value <= highest:  # also true of NaN; an integer beyond any float compares exactly
        raise ValidationError(f"{name} must be between {lowest:g} and {highest:g}.", param=name)


def _check_strings(name: str, values: tuple[str, ...]) -> None:
    if len(values) > MAX_ENTRIES[name]:
        raise ValidationError(f"{name} has more than {MAX_ENTRIES[name]} entries.", param=name)
    for value in values:
        if not value:
            raise ValidationError(f"{name} has an empty entry.", param=name)
        if len(value) > MAX_ENTRIES[f"{name}_chars"]:
            raise ValidationError(f"An entry of {name} is over {MAX_ENTRIES[f'{name}_chars']} characters.", param=name)
