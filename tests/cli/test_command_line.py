"""The command line: errors of one line and a remedy, nothing heavy imported before it is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from penstock import __version__
from penstock.cli.main import main
from penstock.cli.parser import build_parser
from penstock.config.settings import SPECS

COMMANDS = [["serve"], ["chat"], ["run"], ["doctor"], ["config", "explain"]]


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom penstock.cli.main import main\n"
        "try: main(['serve', '--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'starlette', 'uvicorn', 'tokenizers', 'jinja2',\n"
        "         'prometheus_client',\n"
        "         'huggingface_hub', 'rich', 'psutil', 'asyncio', 'msgspec'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("HEAVY []\n"), done.stdout[-300:]


def test_every_setting_has_its_flag_in_serve_and_explain() -> None:
    for words in (["serve"], ["config", "explain"]):
        for spec in SPECS.values():
            value = {"integer": "1", "number": "1", "size": "1GiB", "list": "a", "flag": "", "text": "x"}[spec.kind]
            flag = [] if spec.name == "model" else [spec.flag]
            parsed = build_parser().parse_args([*words, *flag, *([value] if value else [])])
            assert getattr(parsed, spec.name) is not None, spec.name


def test_flags_can_be_negated_and_repeated() -> None:
    parsed = build_parser().parse_args(
        ["serve", "m", "--no-enable-prefix-caching", "--served-model-name", "a", "--served-model-name", "b,c"]
    )
    assert (parsed.model, parsed.enable_prefix_caching, parsed.served_model_name) == ("m", False, ["a", "b,c"])


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_explains_itself(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0
    assert "usage: penstock" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"penstock {__version__}\n"


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "serve" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "cause", "remedy"),
    [
        (["serve", "--max-model-length", "5"], "--max-model-length", "--max-model-len"),
        (["serve", "--prt=5"], "--prt", "--port"),
        (["serve", "--max-num", "5"], "--max-num", "--max-num-seqs"),
        (["serve", "a", "b"], "unknown argument b", "--help"),
        (["config", "explain", "--dtyp", "x"], "--dtyp", "--dtype"),
        (["dance"], "dance", "--help"),
        (["config"], "required", "--help"),
        (["run", "only-one"], "OUTPUT", "--help"),
    ],
)
def test_mistyped_words_are_named_with_the_nearest(
    arguments: list[str], cause: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert cause in lines[0]
    assert remedy in lines[1]


@pytest.mark.parametrize(
    ("arguments", "environ", "cause"),
    [
        (["serve", "--port", "99999"], {}, "port (flag --port)"),
        (["serve", "--dtype", "int3"], {}, "dtype"),
        (["serve"], {"PENSTOCK_PORT": "x"}, "variable PENSTOCK_PORT"),
        (["serve"], {"PENSTOCK_PROT": "1"}, "PENSTOCK_PROT"),
        (["serve", "--config", "/nowhere.toml"], {}, "/nowhere.toml"),
        (["serve", "--host", "0.0.0.0", "--port", "0"], {}, "API key"),
        (["serve", "/nowhere/model", "--port", "0"], {}, "/nowhere/model"),
        (["serve", "/", "--port", "0"], {}, "config.json"),
        (["serve", "--max-memory", "2MiB", "--port", "0"], {}, "GiB are needed"),
        (["serve", "--max-model-len", "999999", "--port", "0"], {}, "999999"),
        (["chat", "--max-memory", "2MiB"], {}, "GiB are needed"),
        (["run", "/nowhere.jsonl", "/tmp/out.jsonl"], {}, "/nowhere.jsonl"),
        (["chat", "--url", "ftp://x"], {}, "ftp://x"),
        (["chat", "--url", "http://127.0.0.1:1"], {}, "127.0.0.1"),
    ],
)
def test_errors_have_a_cause_a_remedy_and_no_trace(
    arguments: list[str], environ: dict[str, str], cause: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert main(arguments) in (1, 2)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("penstock: ")]
    assert len(lines) == 2
    assert cause in lines[0]
    assert lines[1].startswith("penstock: remedy: ")


def test_debug_shows_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.base.errors import ConfigError

    with pytest.raises(ConfigError):
        main(["serve", "--port", "99999", "--log-level", "debug"])


def test_explain_prints_value_source_and_effect(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("max_num_seqs = 3\n")
    monkeypatch.setenv("PENSTOCK_API_KEY", "hunter2")
    assert main(["config", "explain", "--port", "1", "--config", str(file)]) == 0
    text = capsys.readouterr().out
    assert "port = 1    (flag --port)" in text
    assert f"max_num_seqs = 3    (file {file})" in text
    assert "api_key = ********    (variable PENSTOCK_API_KEY)" in text
    assert "hunter2" not in text
    assert "dtype = auto, here bfloat16    (default)" in text
    for spec in SPECS.values():
        assert f"{spec.name} = " in text
