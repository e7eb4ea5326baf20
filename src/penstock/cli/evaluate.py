"""`penstock eval perplexity`: how well a model predicts a text, with the float model beside it on demand."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Final

import msgspec

from penstock.cli.checkpoint import engine_config, find_checkpoint
from penstock.cli.progress import ShareBar
from penstock.cli.text_input import read_text
from penstock.config.engine import EngineConfig
from penstock.config.settings import ResolvedSettings, Settings

DEFAULT_WINDOW: Final = 512


def eval_perplexity(resolved: ResolvedSettings, options: argparse.Namespace) -> int:
    """Prints perplexity (and divergence from --reference); the exit status."""
    from penstock.frontend.tokenizer import Tokenizer
    from penstock.llm.perplexity import Predictor, compare

    settings = resolved.values
    path = find_checkpoint(settings)
    tokens = Tokenizer.load(path).encode(read_text(Path(options.text)), add_special_tokens=False)
    if options.max_tokens:
        tokens = tokens[: options.max_tokens]
    config = _config(settings, path, options.context)
    bar = ShareBar("load")
    model = Predictor(config, bar.show)
    reference = None
    if options.reference:
        plain = dataclasses.replace(settings, model=options.reference, quantization="none", activations=None)
        reference = Predictor(_config(plain, find_checkpoint(plain), options.context), bar.show)
    bar.close()
    bar = ShareBar("score")
    result = compare(model, reference, tokens, config.scheduler.max_model_len, bar.show)
    bar.close()
    print(f"perplexity {result.model.perplexity:.4f}  ({result.model.num_tokens} tokens predicted)")
    if result.reference is not None:
        change = result.model.perplexity / result.reference.perplexity - 1
        print(f"reference  {result.reference.perplexity:.4f}  (the model is at {change:+.2%})")
        print(f"divergence {result.divergence:.6f} nats  (same likeliest token: {result.same_best:.2%})")
    return 0


def _config(settings: Settings, path: Path, window: int) -> EngineConfig:
    """The engine's configuration with a context of one window."""
    config = engine_config(settings, path)
    length = min(window, config.scheduler.max_model_len)
    return msgspec.structs.replace(config, scheduler=msgspec.structs.replace(config.scheduler, max_model_len=length))
