"""The files of a checkpoint that say how its text works: tokenizer.json, its configuration, the chat templates.

Read the way transformers 5 reads them, so that both agree on what a token, a special token and a template is.
Never: loads weights, opens anything outside the checkpoint's directory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from tokenizers import Tokenizer as Backend

from penstock.base.errors import CheckpointError
from penstock.frontend.gguf_tokenizer import GGUFText
from penstock.loader.package import GGUF_TEXT

Pipeline = Literal["file", "llama", "qwen2"]

_SPECIAL_NAMES: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What transformers' classes assume where tokenizer_config.json is silent.
_SPECIAL_DEFAULTS: Final[dict[Pipeline, dict[str, str]]] = {
    "file": {},
    "llama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "qwen2": {"eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
}
_TOKEN_FLAGS: Final = ("single_word", "lstrip", "rstrip", "normalized", "special")
_OTHER_TOKENIZER_FILES: Final = (
    "tokenizer.model",
    "tiktoken.model",
    "tekken.json",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)


@dataclass(frozen=True)
class TextFiles:
    """What `read` found. Nothing here is a tokenizer yet.

    special_tokens: by name ("bos_token" and so on); templates see them under these names.
    added_tokens: (id, content, flags) from tokenizer_config.json, in id order.
    extra_special_tokens: further tokens declared special, by content.
    templates: chat templates by name; the unnamed one is "default".
    eos_token_ids: ids that config.json or generation_config.json name; empty when they name none.
    backend: the tokenizer of a GGUF; None for a directory, whose tokenizer.json is yet to be read.
    """

    path: Path
    model_type: str
    tokenizer_config: dict[str, Any]
    special_tokens: dict[str, str]
    added_tokens: list[tuple[int, str, dict[str, bool]]]
    extra_special_tokens: list[str]
    templates: dict[str, str]
    eos_token_ids: list[int]
    pipeline: Pipeline
    backend: Backend | None = None

    @classmethod
    def read(cls, path: Path) -> TextFiles:
        """Reads the checkpoint's directory, or its GGUF file. Raises CheckpointError, naming what is wrong."""
        if path.is_file():
            return cls._from_gguf(path)
        if (path / GGUF_TEXT).is_file():
            return cls._from_gguf(path / GGUF_TEXT)
        if not (path / "tokenizer.json").is_file():
            _refuse(path)
        model = _read_json(path / "config.json")
        config = _read_json(path / "tokenizer_config.json")
        pipeline = _pipeline(model.get("model_type", ""), config.get("tokenizer_class"))
        added = config.get("added_tokens_decoder")
        special_map = _read_json(path / "special_tokens_map.json") if added is None else {}
        named = {**_SPECIAL_DEFAULTS[pipeline], **config, **special_map}
        contents = {name: _content(named.get(name)) for name in _SPECIAL_NAMES}
        return cls(
            path=path,
            model_type=model.get("model_type", ""),
            tokenizer_config=config,
            special_tokens={name: content for name, content in contents.items() if content is not None},
            added_tokens=_added_tokens(added or {}, path),
            extra_special_tokens=_extra_special_tokens({**config, **special_map}),
            templates=_templates(path, config),
            eos_token_ids=_eos_token_ids(_read_json(path / "generation_config.json"), model),
            pipeline=pipeline,
        )

    @classmethod
    def _from_gguf(cls, path: Path) -> TextFiles:
        text = GGUFText(path)
        return cls(
            path=path,
            model_type=text.architecture,
            tokenizer_config={},
            special_tokens=text.special_tokens,
            added_tokens=[],
            extra_special_tokens=[],
            templates=text.templates,
            eos_token_ids=text.eos_token_ids,
            pipeline="file",
            backend=text.backend,
        )


def _refuse(path: Path) -> None:
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory.", remedy="Give the directory of a checkpoint.")
    found = [name for name in _OTHER_TOKENIZER_FILES if (path / name).is_file()]
    detail = f"only {', '.join(found)}" if found else "no other tokenizer either"
    raise CheckpointError(
        f"{path} has no tokenizer.json ({detail}).",
        remedy="Write one with transformers, once: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)."
        if found
        else "Add the tokenizer.json that belongs to this model.",
    )


def _read_json(file: Path) -> dict[str, Any]:
    """The object in `file`; empty when there is no such file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}.", remedy="Fetch the checkpoint again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds no JSON object.", remedy="Fetch the checkpoint again.")
    return value


def _content(token: object) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _added_tokens(declared: dict[str, Any], path: Path) -> list[tuple[int, str, dict[str, bool]]]:
    tokens = []
    for token_id, token in declared.items():
        content = _content(token)
        if content is None or not token_id.isdecimal():
            raise CheckpointError(f"{path / 'tokenizer_config.json'} declares a malformed added token.")
        flags = {flag: bool(token[flag]) for flag in _TOKEN_FLAGS if isinstance(token, dict) and flag in token}
        tokens.append((int(token_id), content, flags))
    return sorted(tokens, key=lambda token: token[0])


def _extra_special_tokens(config: dict[str, Any]) -> list[str]:
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    values = extra.values() if isinstance(extra, dict) else extra
    return [content for content in map(_content, values) if content is not None]


def _templates(path: Path, config: dict[str, Any]) -> dict[str, str]:
    """Template files win over tokenizer_config.json; chat_template.json (an older habit of processors) comes last."""
    files = {"default": path / "chat_template.jinja"}
    files.update({file.stem: file for file in sorted((path / "additional_chat_templates").glob("*.jinja"))})
    found = {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}
    if found:
        return found
    declared = config.get("chat_template") or _read_json(path / "chat_template.json").get("chat_template")
    if isinstance(declared, str):
        return {"default": declared}
    if isinstance(declared, dict):
        return {name: source for name, source in declared.items() if isinstance(source, str)}
    if isinstance(declared, list):
        return {entry["name"]: entry["template"] for entry in declared}
    return {}


def _eos_token_ids(generation: dict[str, Any], model: dict[str, Any]) -> list[int]:
    for config in (generation, model, model.get("text_config") or {}):
        eos = config.get("eos_token_id")
        if eos is not None:
            ids = eos if isinstance(eos, list) else [eos]
            return [token_id for token_id in ids if isinstance(token_id, int)]
    return []


def _pipeline(model_type: str, tokenizer_class: object) -> Pipeline:
    """Whether transformers 5 takes normalizer, pre-tokenizer and decoder from the file or from a class of its own."""
    name = tokenizer_class.removesuffix("Fast") if isinstance(tokenizer_class, str) else None
    if model_type == "qwen2" or name == "Qwen2Tokenizer" or (model_type == "qwen3" and name is None):
        return "qwen2"
    if name == "LlamaTokenizer" and model_type != "mistral":
        return "llama"
    return "file"
