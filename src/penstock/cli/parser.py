"""The command line, made from the table of settings. Values are parsed there: one error text for all sources."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from penstock.cli.bench_parser import add_advise, add_bench
from penstock.config.settings import SPECS, ResolvedSettings, SettingSpec, nearest, resolve

_ENGINE_GROUPS = ("Model", "Engine")


class Parser(argparse.ArgumentParser):
    """Names the nearest flag when one is unknown; never guesses abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        parsed, rest = super().parse_known_args(args, namespace)
        if rest:
            known = parsed.command_parser if parsed.command else self
            flags = [flag for action in known._actions for flag in action.option_strings]
            flag = rest[0].split("=")[0]
            remedy = nearest(flag, flags) if flag.startswith("-") else f"`{known.prog} --help` shows what it takes."
            _fail(f"unknown argument {rest[0]}", remedy)
        return parsed

    def error(self, message: str) -> NoReturn:
        _fail(message, f"`{self.prog} --help` shows what it takes.")


def _fail(cause: str, remedy: str) -> NoReturn:
    print(f"penstock: error: {cause}\npenstock: remedy: {remedy}", file=sys.stderr)
    sys.exit(2)


def build_parser() -> Parser:
    parser = Parser(prog="penstock", description="Serve open-weights language models: one engine, one command.")
    parser.add_argument("-V", "--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    _add_serve(commands)
    _add_chat(commands)
    _add_run(commands)
    add_bench(commands, _command, Parser)
    _add_quantize(commands)
    _add_compile(commands)
    _add_eval(commands)
    add_advise(commands, _command)
    _add_doctor(commands)
    _add_config(commands)
    return parser


def settings_from(options: argparse.Namespace) -> ResolvedSettings:
    """The settings that a parsed command line, the environment and a file give. Raises ConfigError."""
    flags = {name: getattr(options, name, None) for name in SPECS}
    return resolve(flags, file=options.config)


def _add_serve(commands: Any) -> None:
    command = _command(commands, "serve", "serve a model over HTTP (OpenAI's API)", _run_serve)
    _add_settings(command, SPECS.values())


def _add_chat(commands: Any) -> None:
    command = _command(commands, "chat", "talk to a model in the terminal", _run_chat)
    command.add_argument("--url", help="talk to this server instead of loading a model, such as http://127.0.0.1:8000")
    command.add_argument("--system", help="system prompt")
    command.add_argument("--temperature", type=float, default=0.7, help="0 always takes the likeliest token")
    command.add_argument("--max-tokens", type=int, help="most tokens of an answer")
    _add_settings(command, _local_specs())


def _add_run(commands: Any) -> None:
    command = _command(commands, "run", "answer a file of requests: JSON lines in, JSON lines out", _run_batch)
    command.add_argument("input", metavar="INPUT", help="JSON lines: OpenAI batch lines, or request bodies")
    command.add_argument("output", metavar="OUTPUT", help="JSON lines; what is answered in it is not asked again")
    command.add_argument("--model", metavar="MODEL", help=SPECS["model"].help)
    command.add_argument("--url", help="send the requests to this server instead of loading a model")
    command.add_argument("--concurrency", type=int, default=64, help="most requests at the same time")
    _add_settings(command, [spec for spec in _local_specs() if spec.name != "model"])


def _add_quantize(commands: Any) -> None:
    command = _command(commands, "quantize", "write a float model as a smaller file", _run_quantize)
    command.add_argument("input", metavar="INPUT", help="a directory or hub id of a float model")
    command.add_argument("output", metavar="OUTPUT", help="the .gguf file, or for other formats the directory to write")
    formats = (
        "q8_0, q6_k, q5_k_m, q4_k_m, q4_0, q3_k_m, q2_k, f16, bf16 (GGUF); w8a8, w4a16 (compressed-tensors); gptq; awq"
    )
    command.add_argument("--to", metavar="FORMAT", required=True, help=formats)
    command.add_argument("--calibration", metavar="FILE", help="UTF-8 text like what the model will meet")
    tokens = "use so many tokens of it [16384]"
    command.add_argument("--calibration-tokens", metavar="N", type=int, default=16384, help=tokens)
    command.add_argument("--bits", metavar="N", type=int, default=4, help="of gptq: 2, 3, 4 or 8 [4]")
    group = "inputs that share a scale, for w4a16, gptq and awq: 32, 64, 128 or 256 [128]"
    command.add_argument("--group-size", metavar="N", type=int, default=128, help=group)
    command.add_argument("--act-order", action="store_true", help="gptq and w4a16: round the largest inputs first")
    command.add_argument("--revision", help=SPECS["revision"].help)
    command.add_argument("--config", help=argparse.SUPPRESS)


def _add_compile(commands: Any) -> None:
    text = "pack a model's weights once, to start from them in seconds"
    command = _command(commands, "compile", text, _run_compile)
    command.add_argument("model", metavar="MODEL", help="a directory or hub id")
    command.add_argument("output", metavar="OUT", help="the directory to write; `penstock serve OUT` starts from it")
    names = ("revision", "dtype", "quantization", "activations", "num_threads", "device", "kernels")
    _add_settings(command, [SPECS[name] for name in names])


def _add_eval(commands: Any) -> None:
    evaluation = commands.add_parser("eval", help="measure a model")
    inner = evaluation.add_subparsers(dest="eval_command", metavar="perplexity", parser_class=Parser, required=True)
    text = "how well a model predicts a text, and what its quantization lost"
    command = _command(inner, "perplexity", text, _run_perplexity)
    evaluation.set_defaults(command_parser=command)
    command.add_argument("--text", metavar="FILE", required=True, help="UTF-8 text to predict")
    command.add_argument("--reference", metavar="MODEL", help="the float model, to compare with")
    command.add_argument("--context", type=int, default=512, help="tokens of a window; windows do not overlap [512]")
    command.add_argument("--max-tokens", type=int, default=0, help="predict only so many tokens [all]")
    _add_settings(command, [spec for spec in _local_specs() if spec.name != "api_key"])


def _add_doctor(commands: Any) -> None:
    command = _command(commands, "doctor", "check this machine and say what is wrong with it", _run_doctor)
    command.add_argument("--config", help=argparse.SUPPRESS)


def _add_config(commands: Any) -> None:
    config = commands.add_parser("config", help="look at the settings")
    inner = config.add_subparsers(dest="config_command", metavar="explain", parser_class=Parser, required=True)
    text = "print every setting: its value, where it comes from, what it does"
    command = _command(inner, "explain", text, _run_explain)
    config.set_defaults(command_parser=command)
    _add_settings(command, SPECS.values())


def _command(commands: Any, name: str, text: str, run: Any) -> Parser:
    command: Parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.set_defaults(run=run, command_parser=command)
    return command


def _local_specs() -> list[SettingSpec]:
    """The settings of commands that may load a model themselves, or ask a server that wants a key."""
    names = ("api_key", "log_level")
    return [spec for spec in SPECS.values() if spec.group in _ENGINE_GROUPS or spec.name in names]


def _add_settings(parser: Parser, specs: Any) -> None:
    groups: dict[str, Any] = {}
    for spec in specs:
        if spec.name == "model":
            parser.add_argument("model", nargs="?", metavar="MODEL", help=spec.help)
            continue
        if spec.group not in groups:
            groups[spec.group] = parser.add_argument_group(spec.group)
        _add_setting(groups[spec.group], spec)
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings, keyed by their names")


def _add_setting(group: Any, spec: SettingSpec) -> None:
    text = f"{spec.help} [{spec.show(spec.default)}{': ' + spec.auto if spec.auto else ''}]".replace("%", "%%")
    if spec.kind == "flag":
        group.add_argument(spec.flag, action=argparse.BooleanOptionalAction, default=None, help=text)
    elif spec.kind == "list":
        group.add_argument(spec.flag, action="append", metavar="KEY" if spec.secret else "NAME", help=text)
    else:
        metavar = "{" + ",".join(spec.choices) + "}" if spec.choices else _METAVARS[spec.kind]
        group.add_argument(spec.flag, metavar=metavar, help=text)


_METAVARS = {"text": "TEXT", "integer": "N", "number": "SECONDS", "size": "SIZE"}


def _run_serve(options: argparse.Namespace) -> int:
    from penstock.cli.serve import serve

    return serve(settings_from(options))


def _run_chat(options: argparse.Namespace) -> int:
    from penstock.cli.chat import chat

    return chat(settings_from(options), options)


def _run_batch(options: argparse.Namespace) -> int:
    from penstock.cli.batch import run_batch

    return run_batch(settings_from(options), options)


def _run_quantize(options: argparse.Namespace) -> int:
    from penstock.cli.quantize import quantize

    return quantize(options)


def _run_compile(options: argparse.Namespace) -> int:
    from pathlib import Path

    from penstock.cli.compile import compile_model

    return compile_model(settings_from(options), Path(options.output))


def _run_perplexity(options: argparse.Namespace) -> int:
    from penstock.cli.evaluate import eval_perplexity

    return eval_perplexity(settings_from(options), options)


def _run_doctor(_options: argparse.Namespace) -> int:
    from penstock.cli.doctor import doctor

    return doctor()


def _run_explain(options: argparse.Namespace) -> int:
    from penstock.cli.explain import explain

    return explain(settings_from(options))
