"""What each weight format loses: perplexity and divergence of the bundled model, on two texts.

    python benchmarks/quality.py [--tokens 16384] [--llamacpp PYTHON] [--only TEXT] [--results FILE.json]

Each finished row is kept in the results (beside them the table, FILE.md), and is not measured again: a run that was
stopped goes on. Rows measured on another model or on other texts are dropped.

"World": held-out conversations of the bundled model's world. "Own": their beginnings, continued by the bfloat16 model
itself, sampled at temperature 1: there the logarithm of the change in perplexity is the divergence, but for chance. In
the world's text names and numbers are made up, which no model can predict, and chance decides what a loss there costs.

For each format the bundled model is written in it, served by our kernels, and compared with its bfloat16 original (KL
divergence of the next-token distributions), with the very same codes dequantised (by the gguf package, by transformers
for compressed-tensors, else from the stored integers and scales) and run by transformers in float32, and, where
--llamacpp names a Python with llama-cpp-python, with llama.cpp itself on the same file and tokens. That Python's
library also quantises the types that the gguf package cannot write.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tools.bundled_model import corpus  # noqa: E402

from gguf_files import write_gguf  # noqa: E402
from hub_files import SCHEMES, write_hub  # noqa: E402
from penstock.assets import BUNDLED_MODEL  # noqa: E402
from penstock.config.defaults import machine_facts  # noqa: E402
from penstock.config.resolve import EngineOptions, resolve_engine_config  # noqa: E402
from penstock.conversion import Calibration, Recipe, convert  # noqa: E402
from penstock.frontend.tokenizer import Tokenizer  # noqa: E402
from penstock.llm import LLM  # noqa: E402
from penstock.llm.perplexity import Comparison, Predictor, compare  # noqa: E402
from penstock.loader import open_checkpoint, read_model_config  # noqa: E402
from penstock.messages import SamplingParams  # noqa: E402

WINDOW = 512
PROMPT = 48  # tokens that the model's own text begins with
PACKAGE_TYPES = ("F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4")
GGML_TYPES = ("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS")
GGUF_TARGETS = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m", "q2_k")
CALIBRATED = {
    **{target: (target, Recipe()) for target in ("q4_k_m", "q4_0", "q3_k_m", "q2_k", "w8a8", "w4a16", "awq")},
    "w4a16, act-order": ("w4a16", Recipe(act_order=True)),
    **{f"gptq {bits} bit": ("gptq", Recipe(bits=bits)) for bits in (2, 3, 4, 8)},
    "gptq 4 bit, act-order": ("gptq", Recipe(act_order=True)),
}
# Rows of --activations int8, and of --quantization int8 on top, which is for the head.
ROUNDED = ("w4a16", "awq", "gptq 4 bit", "gptq 8 bit")
Quantize = Callable[[np.ndarray, str], np.ndarray]


class Row(msgspec.Struct, frozen=True):
    """Of both texts. ours, exact (the same codes dequantised, in float32), theirs (llama.cpp's), wide (ours with
    --dtype float32, as llama.cpp keeps activations): perplexities. change: ours, over the bfloat16 model's.
    """

    name: str
    bits: float
    ours: list[float]
    change: list[float]
    divergence: list[float]
    same_best: list[float]
    exact: list[float] = []
    theirs: list[float] = []
    wide: list[float] = []


class Results(msgspec.Struct):
    """measured_on: a digest of the model and the texts."""

    measured_on: str
    tokens: int
    rows: dict[str, Row] = {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--llamacpp", type=Path, help="a Python that has llama-cpp-python")
    parser.add_argument("--only", default="", help="formats whose name has one of these texts, with ; between")
    parser.add_argument("--texts", type=Path, help="keep both texts' tokens here: generating one takes a minute")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "quality.json")
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as directory:
        measuring = Measuring(Path(directory), options.tokens, options.llamacpp, options.only, options.texts)
        results = Results(measuring.measured_on, options.tokens)
        if options.results.exists():
            kept = msgspec.json.decode(options.results.read_bytes(), type=Results)
            results = kept if kept.measured_on == results.measured_on else results
        measuring.done = set(results.rows)
        for row in measuring.rows():
            results.rows[row.name] = row
            options.results.write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")
            options.results.with_suffix(".md").write_text("".join(f"{line}\n" for line in table(results)))
            print(line_of(row), flush=True)


class Measuring:
    """Owns `directory`. Rows are made one after the other."""

    def __init__(self, directory: Path, num_tokens: int, llamacpp: Path | None, only: str, texts: Path | None) -> None:
        held_out = corpus.held_out(0, 60)
        text = "".join(
            held_out[index + 60 * maker].text() for index in range(60) for maker in range(len(held_out) // 60)
        )
        seen = "".join(conversation.text() for conversation in itertools.islice(corpus.training(9, 10**6), 400))
        world = Tokenizer.load(BUNDLED_MODEL).encode(text, add_special_tokens=False)[: num_tokens // WINDOW * WINDOW]
        self._texts = kept_texts(texts) or [world, continued(world)]
        self._calibration = Calibration(seen)
        self._directory = directory
        self._llamacpp = llamacpp
        self._only = only
        self.done: set[str] = set()
        seed = json.dumps(self._texts).encode() + (BUNDLED_MODEL / "model.safetensors").read_bytes()
        self.measured_on = hashlib.sha256(seed).hexdigest()
        self._plain = predictor(BUNDLED_MODEL)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32).eval()
        for path in (directory / "texts.json", *([texts] if texts else [])):
            path.write_text(json.dumps(self._texts))

    def rows(self) -> Iterator[Row]:
        written = (self._written(), self._calibrated(), self._rounded(), self._hub())
        return itertools.chain(self._online(), self._gguf_types(), *written)

    def _row(self, name: str, bits: float, path: Path, exact: Sequence[float] = (), **options: str) -> Row:
        found = self._score(predictor(path, **options), self._plain)
        theirs, wide = [], []
        if path.suffix == ".gguf" and self._llamacpp is not None:
            theirs = self._by_llamacpp(self._llamacpp, path)
            wide = [one.model.perplexity for one in self._score(predictor(path, dtype="float32"), None)]
        ours = [one.model.perplexity for one in found]
        changes = [one.model.perplexity / one.reference.perplexity - 1 for one in found if one.reference is not None]
        divergences, same = [one.divergence for one in found], [one.same_best for one in found]
        return Row(name, bits, ours, changes, divergences, same, list(exact), theirs, wide)

    def _score(self, model: Predictor, reference: Predictor | None) -> list[Comparison]:
        return [compare(model, reference, text, WINDOW, lambda _share: None) for text in self._texts]

    def _wanted(self, name: str) -> bool:
        return any(text in name for text in self._only.split(";")) and name not in self.done

    def _online(self) -> Iterator[Row]:
        if self._wanted("bfloat16"):
            yield self._row("bfloat16", 16, BUNDLED_MODEL, self._exact(self._model))
        for kind in ("int8", "fp8"):
            if self._wanted(f"--kv-cache-dtype {kind}"):
                yield self._row(f"--kv-cache-dtype {kind}", 16, BUNDLED_MODEL, kv_cache_dtype=kind)
        for kind, bits in (("int8", 8.0), ("fp8", 8.0), ("q4_k_m", 4.9), ("int4", 4.5)):
            if self._wanted(f"--quantization {kind}"):
                yield self._row(f"--quantization {kind}", bits, BUNDLED_MODEL, quantization=kind)

    def _gguf_types(self) -> Iterator[Row]:
        quantizers: list[tuple[Quantize, tuple[str, ...]]] = [(by_package, PACKAGE_TYPES)]
        if self._llamacpp is not None:
            quantizers.append((by_ggml(self._llamacpp), GGML_TYPES))
        for quantize, kinds in quantizers:
            for kind in filter(lambda kind: self._wanted(f"GGUF {kind}"), kinds):
                path = self._directory / f"{kind}.gguf"
                write_gguf(path, BUNDLED_MODEL, kind, quantize=quantize)
                exact = self._exact(dequantised(self._model, kind, quantize))
                yield self._row(f"GGUF {kind}", bits_of(path), path, exact)

    def _written(self) -> Iterator[Row]:
        for target in filter(lambda target: self._wanted(f"quantize --to {target}"), GGUF_TARGETS):
            path = self._directory / f"{target}.gguf"
            convert(BUNDLED_MODEL, path, target, lambda _share: None)
            yield self._row(f"quantize --to {target}", bits_of(path), path)
        for target in filter(lambda target: self._wanted(f"quantize --to {target}"), ("w8a8", "w4a16")):
            path = self._directory / target
            convert(BUNDLED_MODEL, path, target, lambda _share: None)
            yield self._row(f"quantize --to {target}", bits_of(path), path, self._by_transformers(path))

    def _calibrated(self) -> Iterator[Row]:
        for name, (target, recipe) in CALIBRATED.items():
            if not self._wanted(f"calibrated: {name}"):
                continue
            path = self._directory / (f"c-{name}.gguf" if target in GGUF_TARGETS else f"c-{name}")
            convert(BUNDLED_MODEL, path, target, lambda _share: None, recipe, self._calibration)
            exact = self._by_transformers(path) if target in ("w8a8", "w4a16") else []
            yield self._row(f"calibrated: {name}", bits_of(path), path, exact)

    def _rounded(self) -> Iterator[Row]:
        """Checkpoints that are rounded further at load."""
        rounded, head = {"activations": "int8"}, {"quantization": "int8"}
        wishes = [(name, options) for name in ROUNDED for options in (rounded, {**rounded, **head})]
        for name, options in [*wishes, ("w8a8", head)]:
            flags = " ".join(f"--{option} {value}" for option, value in options.items())
            row_name = f"calibrated: {name}, {flags}"
            if not self._wanted(row_name):
                continue
            target, recipe = CALIBRATED[name]
            path = self._directory / f"c-{name}"
            if not path.exists():
                convert(BUNDLED_MODEL, path, target, lambda _share: None, recipe, self._calibration)
            bits = bits_of(path) - (8 * HEAD_SHARE if "quantization" in options else 0)
            yield self._row(row_name, bits, path, **options)

    def _hub(self) -> Iterator[Row]:
        for name, scheme in SCHEMES.items():
            if not self._wanted(f"hub: {name}"):
                continue
            path = self._directory / f"hub-{name}"
            values = write_hub(BUNDLED_MODEL, path, scheme)
            model = copy.deepcopy(self._model)
            model.load_state_dict(values, strict=False)
            yield self._row(f"hub: {name}", bits_of(path), path, self._exact(model))

    def _exact(self, model: Any) -> list[float]:
        return [perplexity(model, text) for text in self._texts]

    def _by_transformers(self, path: Path) -> list[float]:
        return self._exact(transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval())

    def _by_llamacpp(self, python: Path, path: Path) -> list[float]:
        script = Path(__file__).parent / "peers" / "llamacpp_perplexity.py"
        command = [str(python), str(script), str(self._directory / "texts.json"), str(WINDOW), str(path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return [float(found) for found in json.loads(done.stdout.splitlines()[-1])]


def table(results: Results) -> Iterator[str]:
    yield (
        "| format | bits a weight | world | own | KL divergence | same best token "
        "| same codes in float32: world, own | llama.cpp: world, own | llama.cpp, ours with --dtype float32 |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    yield from map(line_of, results.rows.values())


def line_of(row: Row) -> str:
    """Divergence and best tokens: in the world's text."""
    ours = [f"{found:.4f} ({change:+.2%})" for found, change in zip(row.ours, row.change, strict=True)]
    others = [compared(row.ours, row.exact), compared(row.ours, row.theirs), compared(row.wide, row.theirs)]
    cells = [row.name, f"{row.bits:.2f}", *ours, f"{row.divergence[0]:.5f}", f"{row.same_best[0]:.2%}", *others]
    return f"| {' | '.join(cells)} |"


def compared(ours: list[float], others: list[float]) -> str:
    """Others' perplexities, and where ours lie from them."""
    pairs = zip(ours, others, strict=False)
    return ", ".join(f"{other:.4f} ({one / other - 1:+.2%})" for one, other in pairs)


def kept_texts(path: Path | None) -> list[list[int]]:
    return json.loads(path.read_text()) if path is not None and path.exists() else []


def continued(tokens: list[int]) -> list[int]:
    """The first tokens of each window, and what the model itself would go on with."""
    prompts = [tokens[begin : begin + PROMPT] for begin in range(0, len(tokens), WINDOW)]
    length = WINDOW - PROMPT
    sampling = [SamplingParams(seed=seed, max_tokens=length, ignore_eos=True) for seed in range(len(prompts))]
    with LLM(str(BUNDLED_MODEL), max_model_len=WINDOW) as llm:
        done = llm.generate(prompts, sampling)
    return [
        token
        for prompt, generation in zip(prompts, done, strict=True)
        for token in (*prompt, *generation.outputs[0].token_ids)
    ]


def predictor(path: Path, **options: str) -> Predictor:
    config = resolve_engine_config(str(path), read_model_config(path), EngineOptions(**options), machine_facts())
    limits = msgspec.structs.replace(config.scheduler, max_model_len=WINDOW)
    return Predictor(msgspec.structs.replace(config, scheduler=limits), lambda _share: None)


@torch.inference_mode()
def perplexity(model: Any, tokens: list[int]) -> float:
    total = count = 0.0
    for begin in range(0, len(tokens) - 1, WINDOW):
        window = torch.tensor([tokens[begin : begin + WINDOW]])
        rows = model(window).logits[0, :-1].log_softmax(-1)
        total -= rows.gather(1, window[0, 1:, None]).double().sum().item()
        count += window.shape[1] - 1
    return math.exp(total / count)


def by_package(values: np.ndarray, kind: str) -> np.ndarray:
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])


def by_ggml(python: Path) -> Quantize:
    """llama.cpp's quantisation without an importance matrix."""
    where = "import importlib.util as u; print(u.find_spec('llama_cpp').submodule_search_locations[0])"
    package = subprocess.run([str(python), "-c", where], check=True, capture_output=True, text=True).stdout.strip()
    function = ctypes.CDLL(f"{package}/lib/libggml-base.so").ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    number = ctypes.c_int64
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, number, number, number, ctypes.c_void_p]

    def quantize(values: np.ndarray, kind: str) -> np.ndarray:
        enum = gguf.GGMLQuantizationType[kind]
        items, size = gguf.GGML_QUANT_SIZES[enum]
        values = np.ascontiguousarray(values)
        stored = np.zeros((values.shape[0], values.shape[1] // items * size), np.uint8)
        function(int(enum), values.ctypes.data, stored.ctypes.data, 0, *values.shape, None)
        return stored

    return quantize


def dequantised(model: Any, kind: str, quantize: Quantize) -> Any:
    """The model with every matrix sent through a type and back."""
    result = copy.deepcopy(model)
    for parameter in result.parameters():
        if parameter.dim() == 2:
            stored = quantize(parameter.detach().numpy(), kind)
            values = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind])
            parameter.data = torch.from_numpy(np.ascontiguousarray(values))
    return result


def bits_of(path: Path) -> float:
    """Of the file's tensors, over the weights of the model."""
    file = path if path.is_file() else path / "model.safetensors"
    return file.stat().st_size * 8 / NUM_WEIGHTS


def _count_weights() -> int:
    checkpoint = open_checkpoint(BUNDLED_MODEL)
    count = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())
    checkpoint.close()
    return count


NUM_WEIGHTS = _count_weights()
_MODEL = read_model_config(BUNDLED_MODEL)
HEAD_SHARE = _MODEL.vocab_size * _MODEL.hidden_size / NUM_WEIGHTS

if __name__ == "__main__":
    main()
