"""Every setting of Penstock in one table, and where a value comes from: flag > environment > file > default.

`Settings` is the table: a field is a setting, and its metadata says how it is parsed, bounded and explained. Flags,
PENSTOCK_* variables, file keys, `penstock config explain` and docs/configuration.md are all made from it.
Owns: nothing; this is the only module of the package that reads the environment.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from penstock.base.errors import ConfigError

ENV_PREFIX: Final = "PENSTOCK_"
# Read elsewhere on purpose: the config file's own path, and the native core's choice of instruction set.
ENVIRONMENT_ONLY: Final[dict[str, str]] = {
    "PENSTOCK_CONFIG": "Path of the TOML file; the flag --config wins over it.",
    "PENSTOCK_ISA": "Forces native kernels for less: portable, avx2, avx_vnni, avx512_vnni, avx512 or amx.",
}
MAX_SETTINGS: Final = 60


@dataclass(frozen=True, kw_only=True)
class SettingSpec:
    """How one setting is parsed and explained.

    kind: "text", "integer", "number", "flag", "size" (bytes, "8GiB" is understood) or "list" (comma separated).
    auto: what None, written "auto", means; empty when there is always a value.
    bounds: inclusive, in the setting's unit. secret: never printed.
    """

    name: str
    kind: str
    default: Any
    group: str
    help: str
    auto: str = ""
    bounds: tuple[float, float] | None = None
    choices: tuple[str, ...] = ()
    secret: bool = False

    @property
    def flag(self) -> str:
        """The command-line spelling; `model` is the positional argument."""
        return "MODEL" if self.name == "model" else "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.name.upper()

    def show(self, value: object) -> str:
        """`value` as a user would write it; secrets are masked."""
        if value is None:
            return "auto" if self.auto else "not set"
        if self.secret and value:
            return "********"
        if self.kind == "list":
            return ",".join(value) if isinstance(value, tuple) and value else "not set"
        if self.kind == "flag":
            return "true" if value else "false"
        if self.kind == "size":
            assert isinstance(value, int)
            return format_size(value)
        return str(value) if value != "" else "not set"


def _setting(kind: str, default: Any, group: str, text: str, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"kind": kind, "group": group, "help": text, **more})


_MODEL, _ENGINE, _SERVER, _LOGGING = "Model", "Engine", "Server", "Logging"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings, resolved to typed values. None means auto; `penstock.config.defaults` turns autos into numbers."""

    model: str = _setting(
        "text",
        "",
        _MODEL,
        "A local directory, a GGUF file, or a hub id (org/name, or org/name:Q4_K_M for a GGUF in it). Without it, the "
        "small model that comes with Penstock is served.",
    )
    served_model_name: tuple[str, ...] = _setting(
        "list",
        (),
        _MODEL,
        "Names that clients may use for the model; the first one is reported. Default: MODEL as given.",
    )
    revision: str = _setting(
        "text", "", _MODEL, "Branch, tag or commit of a hub model. It pins every file: weights, tokenizer, template."
    )
    load_format: str | None = _setting(
        "text",
        None,
        _MODEL,
        "safetensors reads the weights (of a GGUF too); dummy makes random ones from the configuration alone.",
        choices=("safetensors", "dummy"),
        auto="safetensors",
    )
    dtype: str | None = _setting(
        "text",
        None,
        _MODEL,
        "Type of weights, activations and KV cache.",
        choices=("bfloat16", "float32"),
        auto="float32 for a float32 checkpoint, else bfloat16",
    )
    quantization: str = _setting(
        "text",
        "none",
        _MODEL,
        "What linears stored in floats are rounded to while they load: all of a float checkpoint; of a quantized one, "
        "which needs no setting, those that it left in floats, such as the head.",
        choices=("none", "int8", "int4", "q4_k_m", "fp8"),
    )
    activations: str | None = _setting(
        "text",
        None,
        _MODEL,
        "int8 rounds the inputs of linears to 8 bits, by 256, where weights are integers stored for inputs of 16 bits "
        "(GPTQ, AWQ, W4A16, W8A16, LLM.int8): faster on a CPU, a little less exact. A GPU multiplies as before.",
        choices=("int8",),
        auto="what the weights' format says",
    )
    max_model_len: int | None = _setting(
        "integer",
        None,
        _MODEL,
        "Longest prompt plus output, in tokens. A longer request is refused, never cut.",
        bounds=(1, 2**24),
        auto="what the checkpoint declares, or less where memory is short (printed at start)",
    )
    seed: int = _setting(
        "integer", 0, _MODEL, "Seeds dummy weights. Requests carry their own seed.", bounds=(0, 2**63 - 1)
    )
    max_memory: int | None = _setting(
        "size",
        None,
        _ENGINE,
        "Memory for weights, KV cache and activations, such as 8GiB. What does not fit is refused.",
        bounds=(2**20, 2**50),
        auto="what is free now (within a container's limit); the KV cache then takes at most half of it",
    )
    max_num_seqs: int | None = _setting(
        "integer",
        None,
        _ENGINE,
        "Most sequences that run at the same time; more wait.",
        bounds=(1, 4096),
        auto="64; on cuda and rocm 256",
    )
    max_num_batched_tokens: int | None = _setting(
        "integer",
        None,
        _ENGINE,
        "Token budget of one step. Larger: faster prefill; smaller: steadier streams beside it.",
        bounds=(16, 2**20),
        auto="512; on cuda and rocm 8192",
    )
    scheduling_policy: str = _setting(
        "text",
        "fcfs",
        _ENGINE,
        "fcfs runs requests as they came; priority runs the lowest `priority` first.",
        choices=("fcfs", "priority"),
    )
    max_num_queued_requests: int = _setting(
        "integer", 10_000, _ENGINE, "Most requests that wait. Beyond it: 429 with Retry-After.", bounds=(1, 10**6)
    )
    max_num_queued_tokens: int = _setting(
        "integer",
        50_000_000,
        _ENGINE,
        "Most prompt tokens that wait. Beyond it: 429 with Retry-After.",
        bounds=(1, 2**40),
    )
    kv_cache_dtype: str = _setting(
        "text",
        "model",
        _ENGINE,
        "How keys and values are kept: as the model's activations, or in 8 bits with a scale for each token and head: "
        "half the memory, at the cost of some exactness.",
        choices=("model", "int8", "fp8"),
    )
    enable_prefix_caching: bool = _setting(
        "flag", True, _ENGINE, "Keeps computed prompts, so that a request that begins alike starts where they differ."
    )
    host_kv_memory: int | None = _setting(
        "size",
        None,
        _ENGINE,
        "Host memory, pinned at the start, for what the prefix cache on a GPU has no room for, such as 64GiB; 0: none.",
        bounds=(0, 2**50),
        auto="on cuda and rocm as large as the KV cache, at most 16 GiB and a quarter of what is free; else 0",
    )
    device: str | None = _setting(
        "text",
        None,
        _ENGINE,
        "Where the model runs. cuda and rocm use the Triton kernels, xpu and mps plain torch. docs/gpu.md says what of "
        "it was measured.",
        choices=("cpu", "cuda", "rocm", "xpu", "mps"),
        auto="the GPU, where there is one that the installed torch was built for, else cpu",
    )
    capture_graphs: bool = _setting(
        "flag",
        True,
        _ENGINE,
        "On a GPU, steps of shapes that recur are captured in the background and replayed as one launch. The answers "
        "are the same.",
    )
    batch_invariant: bool = _setting(
        "flag",
        False,
        _ENGINE,
        "On a GPU, an answer's bits do not depend on what runs beside it; docs/gpu.md names the price. On a CPU they "
        "never do (native kernels).",
    )
    num_threads: int | None = _setting(
        "integer",
        None,
        _ENGINE,
        "Threads of the compute pool.",
        bounds=(1, 1024),
        auto="the physical cores this process may use (within a container's quota)",
    )
    kernels: str | None = _setting(
        "text",
        None,
        _ENGINE,
        "native is the C++ core, triton the GPU's; reference is plain torch, slow and always right.",
        choices=("native", "triton", "reference"),
        auto="the device's: native on a CPU where it is installed, triton on cuda and rocm, else reference",
    )
    host: str = _setting("text", "127.0.0.1", _SERVER, "Address to listen on. Anything but loopback needs an API key.")
    port: int = _setting("integer", 8000, _SERVER, "Port to listen on; 0 takes a free one.", bounds=(0, 65535))
    data_directory: str = _setting(
        "text", "", _SERVER, "Where responses, files and batches are kept. Default: ~/.local/share/penstock."
    )
    lenient: bool = _setting(
        "flag", False, _SERVER, "Ignores unknown fields of a request, and says so in the answer's warnings."
    )
    api_key: tuple[str, ...] = _setting(
        "list",
        (),
        _SERVER,
        "Keys; a client must send one as a bearer token. Prefer the variable: flags show in `ps`.",
        secret=True,
    )
    request_timeout: float = _setting(
        "number",
        600.0,
        _SERVER,
        "Seconds a request may take, queue included. A client may ask for less: x-request-timeout.",
        bounds=(0.001, 86_400.0),
    )
    drain_timeout: float = _setting(
        "number", 30.0, _SERVER, "Seconds that running requests get to finish after SIGTERM.", bounds=(0.0, 3600.0)
    )
    stall_timeout: float = _setting(
        "number",
        30.0,
        _SERVER,
        "Seconds without a finished step, while work exists, until the server reports not ready.",
        bounds=(1.0, 3600.0),
    )
    client_timeout: float = _setting(
        "number",
        60.0,
        _SERVER,
        "Seconds a client may take to send its body or read an answer before it is cut off.",
        bounds=(1.0, 3600.0),
    )
    record: str = _setting(
        "text",
        "",
        _SERVER,
        "Directory to record in: times, lengths and salted hashes of prompts, for `penstock bench replay`, and what "
        "each step took, for `penstock bench sim`.",
    )
    record_contents: bool = _setting(
        "flag", False, _SERVER, "Also record the requests' contents, with addresses, keys and numbers redacted."
    )
    log_level: str = _setting(
        "text",
        "info",
        _LOGGING,
        "Least severe level that is logged; debug adds stack traces to start-up errors.",
        choices=("debug", "info", "warning", "error"),
    )
    log_format: str = _setting(
        "text", "text", _LOGGING, "text for people, json (one object a line) for machines.", choices=("text", "json")
    )

    @property
    def data_path(self) -> Path:
        """data_directory, resolved; where there is no home (in many containers), below the working directory."""
        try:
            return Path(self.data_directory or "~/.local/share/penstock").expanduser()
        except RuntimeError:
            return Path("penstock-data").absolute()


def _build_specs() -> dict[str, SettingSpec]:
    fields = dataclasses.fields(Settings)
    return {field.name: SettingSpec(name=field.name, default=field.default, **field.metadata) for field in fields}


SPECS: Final[Mapping[str, SettingSpec]] = _build_specs()


@dataclass(frozen=True)
class ResolvedSettings:
    """The settings and, by name, where each came from: "flag --port", "variable PENSTOCK_PORT", "file F", "default"."""

    values: Settings
    sources: Mapping[str, str]


def resolve(
    flags: Mapping[str, object], environ: Mapping[str, str] | None = None, file: str | Path | None = None
) -> ResolvedSettings:
    """Finds every setting. flags: by setting name, as strings or typed values; None means "not given".

    environ: defaults to the process environment. file: a TOML file; defaults to PENSTOCK_CONFIG, else none.
    Raises ConfigError for an unknown name (with the nearest known one) and for a value that does not parse or fit.
    """
    environment = os.environ if environ is None else environ
    _check_variables(environment)
    file = file or environment.get("PENSTOCK_CONFIG") or None
    in_file = _read_file(Path(file)) if file else {}
    for name in flags:
        if name not in SPECS:
            raise ConfigError(f"Unknown setting {name!r}.", remedy=nearest(name, SPECS), param=name)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, spec in SPECS.items():
        raw: object
        if flags.get(name) is not None:
            raw, source = flags[name], f"flag {spec.flag}" if name != "model" else "argument MODEL"
        elif spec.variable in environment:
            raw, source = environment[spec.variable], f"variable {spec.variable}"
        elif name in in_file:
            raw, source = in_file[name], f"file {file}"
        else:
            raw, source = spec.default, "default"
        values[name] = spec.default if source == "default" else parse_value(spec, raw, source)
        sources[name] = source
    return ResolvedSettings(Settings(**values), sources)


def parse_value(spec: SettingSpec, raw: object, source: str) -> Any:
    """`raw` (text, or a value of the right type) as the setting's type. Raises ConfigError naming `source`."""
    if spec.auto and (raw is None or raw == "auto"):
        return None
    try:
        value = _PARSERS[spec.kind](raw)
    except (ValueError, TypeError):
        raise ConfigError(
            f"{spec.name} ({source}) is {_quote(spec, raw)}, which is not {_KIND_NAMES[spec.kind]}.",
            remedy=f"Give {spec.flag} {_expectation(spec)}.", param=spec.name,
        ) from None  # fmt: skip
    if spec.choices and value not in spec.choices:
        raise ConfigError(
            f"{spec.name} ({source}) is {_quote(spec, raw)}.", remedy=f"Choose {_expectation(spec)}.", param=spec.name
        )
    if spec.bounds is not None and not spec.bounds[0] <= value <= spec.bounds[1]:
        raise ConfigError(
            f"{spec.name} ({source}) is {_quote(spec, raw)}, out of its bounds.",
            remedy=f"Give {spec.flag} {_expectation(spec)}.", param=spec.name,
        )  # fmt: skip
    return value


def hidden_devices(kind: str, environ: Mapping[str, str] | None = None) -> bool:
    """Whether the vendor's own variable hides every GPU from this process. kind: "cuda" or "rocm"."""
    environment = os.environ if environ is None else environ
    names = {"cuda": ("CUDA_VISIBLE_DEVICES",), "rocm": ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")}[kind]
    return any(environment.get(name, "0").strip() in ("", "-1") for name in names)


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy that names the known spelling closest to `name`."""
    candidates = list(known)
    match = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return f"Did you mean {match[0]}?" if match else "`penstock config explain` lists what exists."


def format_size(size_bytes: int) -> str:
    """Bytes as people write them: 1536 MiB, 8.0 GiB."""
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size_bytes >= 1 << shift:
            return f"{size_bytes / (1 << shift):.1f} {unit}"
    return f"{size_bytes} B"


def _check_variables(environment: Mapping[str, str]) -> None:
    known = {spec.variable for spec in SPECS.values()} | ENVIRONMENT_ONLY.keys()
    for name in environment:
        if name.startswith(ENV_PREFIX) and name not in known:
            raise ConfigError(f"Unknown environment variable {name}.", remedy=nearest(name, known), param=name)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"The configuration file {path} cannot be read: {error.strerror}.",
            remedy="Check --config or PENSTOCK_CONFIG.",
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration file {path} is not TOML: {error}.", remedy="Correct that line.") from None
    for name in content:
        if name not in SPECS:
            raise ConfigError(f"Unknown key {name!r} in {path}.", remedy=nearest(name, SPECS), param=name)
    return content


def _parse_text(raw: object) -> str:
    if not isinstance(raw, str):
        raise TypeError
    return raw


def _parse_integer(raw: object) -> int:
    if isinstance(raw, bool) or not isinstance(raw, (int, str)):
        raise TypeError
    return int(raw)


def _parse_number(raw: object) -> float:
    if isinstance(raw, bool) or not isinstance(raw, (int, float, str)):
        raise TypeError
    value = float(raw)
    if not math.isfinite(value):
        raise ValueError
    return value


def _parse_flag(raw: object) -> bool:
    if isinstance(raw, bool):
        return raw
    if isinstance(raw, str) and raw.lower() in ("1", "true", "yes", "on", "0", "false", "no", "off"):
        return raw.lower() in ("1", "true", "yes", "on")
    raise ValueError


def _parse_size(raw: object) -> int:
    if isinstance(raw, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?\s*", raw, re.IGNORECASE)
        if match is None:
            raise ValueError
        scale = 1024 if match[3] else 1000
        power = "KMGT".index(match[2].upper()) + 1 if match[2] else 0
        return int(float(match[1]) * scale**power)
    return _parse_integer(raw)


def _parse_list(raw: object) -> tuple[str, ...]:
    if isinstance(raw, str):
        raw = raw.split(",")
    if not isinstance(raw, (list, tuple)):
        raise TypeError
    parts = [part for item in raw for part in _parse_text(item).split(",")]
    if not all(part.strip() for part in parts):
        raise ValueError
    return tuple(part.strip() for part in parts)


_PARSERS: Final[Mapping[str, Callable[[object], Any]]] = {
    "text": _parse_text, "integer": _parse_integer, "number": _parse_number, "flag": _parse_flag, "size": _parse_size,
    "list": _parse_list,
}  # fmt: skip

_KIND_NAMES: Final = {
    "text": "text", "integer": "a whole number", "number": "a finite number", "flag": "true or false",
    "size": "a size such as 8GiB", "list": "a comma-separated list",
}  # fmt: skip


def _show_number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _quote(spec: SettingSpec, raw: object) -> str:
    return "a value that is not shown" if spec.secret else repr(raw)[:80]


def _expectation(spec: SettingSpec) -> str:
    if spec.choices:
        return ("auto, " if spec.auto else "") + " or ".join(spec.choices)
    text = _KIND_NAMES[spec.kind]
    if spec.bounds is not None:
        low, high = (format_size(int(edge)) if spec.kind == "size" else _show_number(edge) for edge in spec.bounds)
        text += f" from {low} to {high}"
    return text
