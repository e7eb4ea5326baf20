"""Command line: `python -m tools.bundled_model train|evaluate|install|sample`, from the root of the checkout."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

DEFAULT_WORK = Path("/tmp/penstock-bundled-model")


def main() -> None:
    """Parses the command line and runs one command."""
    parser = argparse.ArgumentParser(prog="python -m tools.bundled_model", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train, or resume; the model appears in WORK/model")
    train.add_argument("--work", type=Path, default=DEFAULT_WORK)
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--threads", type=int, default=1)
    train.add_argument("--minutes", type=float, default=600.0, help="stop after so long; the same command resumes")
    evaluate = commands.add_parser("evaluate", help="exact match on held-out conversations, per category")
    evaluate.add_argument("model", type=Path)
    evaluate.add_argument("--engine", choices=("transformers", "penstock"), default="transformers")
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.add_argument("--per-maker", type=int, default=60)
    evaluate.add_argument("--show", type=int, default=0, help="print so many wrong answers")
    evaluate.add_argument("--threads", type=int, default=1)
    sample = commands.add_parser("sample", help="print training conversations")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--count", type=int, default=10)
    arguments = parser.parse_args()
    {"train": _train, "evaluate": _evaluate, "sample": _sample}[arguments.command](arguments)


def _train(arguments: argparse.Namespace) -> None:
    import torch
    from tools.bundled_model.model import Shape
    from tools.bundled_model.training import Plan, train

    torch.set_num_threads(arguments.threads)
    plan = Plan(seed=arguments.seed)
    train(plan, Shape(), arguments.work, arguments.minutes)


def _evaluate(arguments: argparse.Namespace) -> None:
    import torch
    from tools.bundled_model.evaluation import evaluate, penstock_generate, transformers_generate

    torch.set_num_threads(arguments.threads)
    if arguments.engine == "penstock":
        generate = penstock_generate(arguments.model, arguments.threads)
    else:
        generate = transformers_generate(arguments.model)
    print(evaluate(generate, arguments.seed, arguments.per_maker, arguments.show))


def _sample(arguments: argparse.Namespace) -> None:
    from tools.bundled_model import corpus

    for conversation in itertools.islice(corpus.training(arguments.seed, 0, warm_up=0), arguments.count):
        print(f"--- {conversation.category}\n{conversation.text()}")


main()
