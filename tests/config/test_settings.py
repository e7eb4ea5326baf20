"""Settings: one table, one precedence, every mistake named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from penstock.base.errors import ConfigError
from penstock.config.resolve import EngineOptions
from penstock.config.settings import MAX_SETTINGS, SPECS, Settings, parse_value, resolve


def test_the_table_stays_small_and_complete() -> None:
    assert 0 < len(SPECS) <= MAX_SETTINGS
    for spec in SPECS.values():
        assert spec.help.endswith("."), spec.name
        assert spec.kind in ("text", "list", "flag") or spec.bounds is not None, f"{spec.name} has no bounds"
        assert (spec.default is None) == bool(spec.auto), spec.name


def test_every_default_is_a_legal_value() -> None:
    for spec in SPECS.values():
        if spec.default not in (None, "", ()):
            assert parse_value(spec, spec.default, "default") == spec.default


def test_defaults_agree_with_the_engine_options() -> None:
    options = EngineOptions()
    for field in EngineOptions.__struct_fields__:
        wished = getattr(options, field)
        assert SPECS[field].default == (None if SPECS[field].auto else wished), field


def test_precedence_is_flag_then_variable_then_file_then_default(tmp_path: Path) -> None:
    file = tmp_path / "penstock.toml"
    file.write_text('port = 1001\nhost = "127.0.0.2"\nmax_num_seqs = 7\nlog_level = "debug"\n')
    environ = {"PENSTOCK_PORT": "1002", "PENSTOCK_HOST": "127.0.0.3", "HOME": "/nowhere"}
    resolved = resolve({"port": "1003", "host": None}, environ, file)
    assert resolved.values.port == 1003
    assert resolved.values.host == "127.0.0.3"
    assert resolved.values.max_num_seqs == 7
    assert resolved.values.drain_timeout == SPECS["drain_timeout"].default
    assert resolved.sources["port"] == "flag --port"
    assert resolved.sources["host"] == "variable PENSTOCK_HOST"
    assert resolved.sources["max_num_seqs"] == f"file {file}"
    assert resolved.sources["drain_timeout"] == "default"


def test_the_file_can_come_from_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("port = 1234\n")
    assert resolve({}, {"PENSTOCK_CONFIG": str(file)}).values.port == 1234


def test_resolved_settings_are_frozen() -> None:
    settings = resolve({}, {}).values
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("flags", "environ", "hint"),
    [
        ({"max_model_length": "5"}, {}, "max_model_len"),
        ({}, {"PENSTOCK_MAX_NUM_SEQ": "5"}, "PENSTOCK_MAX_NUM_SEQS"),
        ({}, {"PENSTOCK_DTYP": "float32"}, "PENSTOCK_DTYPE"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(flags: dict[str, str], environ: dict[str, str], hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(flags, environ)
    assert hint in error.value.remedy


def test_unknown_file_keys_are_refused_with_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("prt = 1\n")
    with pytest.raises(ConfigError, match="prt") as error:
        resolve({}, {}, file)
    assert "port" in error.value.remedy


@pytest.mark.parametrize("content", ["port = ", "[", "\xff"])
def test_a_broken_file_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "a.toml"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match="not TOML"):
        resolve({}, {}, file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        resolve({}, {}, tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("port", "80a"), ("port", "-1"), ("port", "65536"), ("port", True), ("port", 1.5), ("request_timeout", "nan"),
        ("request_timeout", "inf"), ("request_timeout", "0"), ("dtype", "int3"), ("max_memory", "8 apples"),
        ("max_memory", "1"), ("enable_prefix_caching", "perhaps"), ("served_model_name", "a,,b"), ("host", 5),
        ("log_level", "loud"), ("api_key", ""),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(name: str, raw: object) -> None:
    with pytest.raises(ConfigError, match=name) as error:
        parse_value(SPECS[name], raw, "test")
    assert error.value.remedy


@pytest.mark.parametrize(
    ("name", "raw", "value"),
    [
        ("max_memory", "8GiB", 8 << 30), ("max_memory", "1.5 gib", 3 << 29), ("max_memory", "2GB", 2 * 10**9),
        ("max_memory", "64m", 64 * 10**6), ("max_memory", "2000000", 2_000_000), ("max_memory", "auto", None),
        ("max_model_len", "auto", None), ("max_model_len", 77, 77), ("enable_prefix_caching", "off", False),
        ("enable_prefix_caching", True, True), ("served_model_name", "a, b", ("a", "b")),
        ("served_model_name", ["a", "b,c"], ("a", "b", "c")), ("drain_timeout", 3, 3.0), ("dtype", "auto", None),
    ],
)  # fmt: skip
def test_values_are_parsed(name: str, raw: object, value: object) -> None:
    assert parse_value(SPECS[name], raw, "test") == value


def test_secrets_are_never_shown() -> None:
    spec = SPECS["api_key"]
    assert "hunter2" not in spec.show(("hunter2",))
    with pytest.raises(ConfigError) as error:
        parse_value(spec, ["hunter2", 5], "test")
    assert "hunter2" not in str(error.value)


def test_settings_fields_have_the_types_that_the_parsers_give() -> None:
    kinds = {"text": str, "integer": int, "number": float, "flag": bool, "size": int, "list": tuple}
    for field in dataclasses.fields(Settings):
        spec = SPECS[field.name]
        if spec.default is not None:
            assert isinstance(spec.default, kinds[spec.kind]), field.name
