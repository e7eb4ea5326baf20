"""What each weight format loses: perplexity and divergence on held-out text of the bundled model's world.

    python benchmarks/quality.py [--tokens 8192] [--ggml PATH/libggml-base.so] [--markdown FILE]

For each format the bundled model is written in it, served by our kernels, and compared with its bfloat16 original (KL
divergence of the next-token distributions) and with the reference implementation of the format: the very same codes
dequantised by the gguf package (or, for compressed-tensors, by their definition) and run by transformers in float32.
With --ggml, the types that the gguf package cannot write are quantised by llama.cpp's own library.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import msgspec  # noqa: E402
from tools.bundled_model import corpus  # noqa: E402

from gguf_files import write_gguf  # noqa: E402
from penstock.assets import BUNDLED_MODEL  # noqa: E402
from penstock.config.defaults import machine_facts  # noqa: E402
from penstock.config.resolve import EngineOptions, resolve_engine_config  # noqa: E402
from penstock.conversion import convert  # noqa: E402
from penstock.frontend.tokenizer import Tokenizer  # noqa: E402
from penstock.llm.perplexity import Comparison, Predictor, compare  # noqa: E402
from penstock.loader import read_model_config  # noqa: E402

WINDOW = 512
PACKAGE_TYPES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4")
GGML_TYPES = ("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS")
Quantize = Callable[[np.ndarray, str], np.ndarray]


class Row(NamedTuple):
    """reference: perplexity of the same codes in the reference implementation; None where there is none."""

    name: str
    bits: float
    found: Comparison
    reference: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--ggml", type=Path, help="llama.cpp's libggml-base.so, to quantise the K and IQ4 types")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    options = parser.parse_args()
    torch.set_num_threads(2)
    text = "".join(conversation.text() for conversation in corpus.held_out(0, 60))
    tokens = Tokenizer.load(BUNDLED_MODEL).encode(text, add_special_tokens=False)[: options.tokens]
    with tempfile.TemporaryDirectory() as directory:
        lines = []
        for line in table(measure(Path(directory), tokens, options.ggml)):
            print(line, flush=True)
            lines.append(line)
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")


def measure(directory: Path, tokens: list[int], ggml: Path | None) -> Iterator[Row]:
    plain = predictor(BUNDLED_MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32).eval()

    def row(name: str, bits: float, path: Path, reference: float | None, **options: str) -> Row:
        found = compare(predictor(path, **options), plain, tokens, WINDOW, lambda _share: None)
        return Row(name, bits, found, reference)

    yield row("bfloat16", 16, BUNDLED_MODEL, perplexity(model, tokens))
    yield row("--quantization int8", 8, BUNDLED_MODEL, None, quantization="int8")
    yield row("--quantization int4", 4.5, BUNDLED_MODEL, None, quantization="int4")
    yield row("--quantization q4_k_m", 4.9, BUNDLED_MODEL, None, quantization="q4_k_m")
    yield row("--quantization fp8", 8, BUNDLED_MODEL, None, quantization="fp8")
    for target in ("q8_0", "q4_0", "q4_k_m"):
        path = directory / f"{target}.gguf"
        convert(BUNDLED_MODEL, path, target, lambda _share: None)
        yield row(f"GGUF {target} (penstock quantize)", bits_of(path), path, None)
    quantizers: list[tuple[Quantize, tuple[str, ...]]] = [(by_package, PACKAGE_TYPES)]
    if ggml is not None:
        quantizers.append((by_ggml(ggml), GGML_TYPES))
    for quantize, kinds in quantizers:
        for kind in kinds:
            path = directory / f"{kind}.gguf"
            write_gguf(path, BUNDLED_MODEL, kind, tokenizer=False, quantize=quantize)
            reference = perplexity(dequantised(model, kind, quantize), tokens)
            yield row(f"GGUF {kind}", bits_of(path), path, reference)
    for target in ("w8a8", "w4a16"):
        path = directory / target
        convert(BUNDLED_MODEL, path, target, lambda _share: None)
        reader = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        yield row(f"compressed-tensors {target}", bits_of(path / "model.safetensors"), path, perplexity(reader, tokens))


def table(rows: Iterator[Row]) -> Iterator[str]:
    yield "| format | bits a weight | perplexity | against bfloat16 | KL divergence | same best token | reference |"
    yield "|---|---|---|---|---|---|---|"
    for name, bits, found, reference in rows:
        assert found.reference is not None
        change = found.model.perplexity / found.reference.perplexity - 1
        theirs = "" if reference is None else f"{reference:.4f} ({found.model.perplexity / reference - 1:+.2%})"
        yield (
            f"| {name} | {bits:.2f} | {found.model.perplexity:.4f} | {change:+.2%} | {found.divergence:.5f} "
            f"| {found.same_best:.2%} | {theirs} |"
        )


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


def by_ggml(path: Path) -> Quantize:
    """llama.cpp's quantisation without an importance matrix."""
    function = ctypes.CDLL(str(path)).ggml_quantize_chunk
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
    """Of the file, over the weights of the model."""
    count = sum(math.prod(shape) for shape in SHAPES)
    return path.stat().st_size * 8 / count


def _shapes() -> list[tuple[int, ...]]:
    from penstock.loader import open_checkpoint

    checkpoint = open_checkpoint(BUNDLED_MODEL)
    shapes = [checkpoint.shape(name) for name in checkpoint.names()]
    checkpoint.close()
    return shapes


SHAPES = _shapes()

if __name__ == "__main__":
    main()
