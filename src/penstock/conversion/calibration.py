"""Runs a float model over text, linear by linear: what each linear's inputs are decides how it is quantised.

The model's own forward pass runs once, over all windows of the text together, so that a layer is done before the next
begins. A linear's weight is read when it is multiplied and dropped after: of the weights, one linear is in memory at a
time. What takes memory are the activations of the text: about 10 to 20 values of the hidden size for each token.

Shapes: T tokens of all windows, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import msgspec
import torch
from torch import Tensor

from penstock.base.errors import CheckpointError, ConfigError
from penstock.config.defaults import machine_facts
from penstock.config.engine import EngineConfig
from penstock.config.model import ModelConfig
from penstock.config.resolve import EngineOptions, resolve_engine_config
from penstock.conversion.recipe import Calibration
from penstock.conversion.source_rows import SourceRows
from penstock.frontend.tokenizer import Tokenizer
from penstock.kernels import ops as op_table
from penstock.kernels.ops import Ops
from penstock.layers import AttentionMetadata, Weights
from penstock.models import ARCHITECTURES
from penstock.quantization import LinearWeight, TensorSource, UnquantizedFormat, WholeStepWeight
from penstock.runner.kv_pool import KVPool
from penstock.runner.loading import torch_dtype

_WINDOW: Final = 512
_FEWEST_TOKENS: Final = 128


class Site(NamedTuple):
    """Linears (named without suffix) that share an input: they are fused, or there is one."""

    names: tuple[str, ...]
    num_rows: tuple[int, ...]
    num_columns: int


class Observer(Protocol):
    def __call__(self, site: Site, x_TK: Tensor) -> Callable[[Ops], LinearWeight] | None:
        """Sees the inputs of a site; returns what loads the weight they are multiplied with. None: it as it is."""
        ...


def windows_of(source: Path, calibration: Calibration, model: ModelConfig) -> list[list[int]]:
    """The text's tokens in pieces of equal length. Raises ConfigError when there is too little text."""
    tokens = Tokenizer.load(source).encode(calibration.text, add_special_tokens=False)[: calibration.max_tokens]
    window = min(_WINDOW, model.max_context_len, len(tokens))
    if len(tokens) < _FEWEST_TOKENS:
        raise ConfigError(
            f"The calibration text has {len(tokens)} tokens; {_FEWEST_TOKENS} is the least, thousands are better.",
            remedy="Give more text.",
            param="calibration",
        )
    return [tokens[begin : begin + window] for begin in range(0, len(tokens) - window + 1, window)]


@torch.inference_mode()
def observe(
    source: Path,
    rows: SourceRows,
    windows: Sequence[Sequence[int]],
    observer: Observer,
    on_progress: Callable[[float], None],
) -> None:
    """Runs the model over the windows (of one length) and shows each linear's inputs to `observer`, in order."""
    if rows.model.is_encoder:
        raise CheckpointError(f"{rows.model.architecture} is an encoder; calibration is for language models.")
    config = _config(source, rows.model, len(windows[0]))
    num_threads = min(config.num_threads, torch.get_num_threads())
    torch.set_num_threads(num_threads)
    ops, dtype = op_table.load(config.kernels, num_threads), torch_dtype(config.dtype)
    chosen = _ObservedFormat(dtype, observer, on_progress)
    model = ARCHITECTURES[rows.model.architecture](
        rows.model, Weights(rows.source, chosen, dtype, ops), len(windows[0])
    )
    one_layer = msgspec.structs.replace(rows.model, num_layers=1)
    num_blocks = -(-len(windows[0]) // config.cache.block_size)
    pool = KVPool(one_layer, len(windows) * num_blocks, dtype, ops.layouts)
    count = len(windows[0])
    tables = torch.arange(len(windows) * num_blocks, dtype=torch.int32).view(len(windows), num_blocks)
    first_slots = tables[:, 0].long() * config.cache.block_size
    metadata = AttentionMetadata(
        torch.arange(len(windows) + 1, dtype=torch.int32) * count,
        torch.full((len(windows),), count, dtype=torch.int32),
        tables,
        (first_slots[:, None] + torch.arange(count)).flatten(),
    )
    positions = torch.arange(count).repeat(len(windows))
    tokens = torch.tensor([token for window in windows for token in window])
    # A layer has read all its keys before the next writes its own: one cache serves them all.
    model.forward(tokens, positions, pool.caches * rows.model.num_layers, metadata, ops)


def _config(source: Path, model: ModelConfig, window: int) -> EngineConfig:
    return resolve_engine_config(str(source), model, EngineOptions(max_model_len=window, device="cpu"), machine_facts())


class _ObservedFormat:
    """Linears that are read when they are multiplied, and shown to the observer."""

    def __init__(self, dtype: torch.dtype, observer: Observer, on_progress: Callable[[float], None]) -> None:
        self._plain = UnquantizedFormat(dtype)
        self._observer = observer
        self._on_progress = on_progress
        self._num_sites = 0
        self._num_done = 0

    def load_linear(
        self, source: TensorSource, names: Sequence[str], num_rows: Sequence[int], num_columns: int, ops: Ops
    ) -> LinearWeight:
        site = Site(tuple(names), tuple(num_rows), num_columns)
        self._num_sites += names[0].startswith("model.layers.")

        def see(x_TK: Tensor) -> LinearWeight:
            load = self._observer(site, x_TK)
            weight = load(ops) if load else self._plain.load_linear(source, names, num_rows, num_columns, ops)
            self._num_done += 1
            self._on_progress(self._num_done / self._num_sites)
            return weight

        return _Observed(sum(num_rows), num_columns, see)

    def load_embedding(
        self, source: TensorSource, name: str, num_rows: int, num_columns: int, *_: object
    ) -> _StoredRows:
        return _StoredRows(source, f"{name}.weight", (num_rows, num_columns), self._plain.dtype)

    def linear_nbytes(self, *_: object) -> int:
        raise AssertionError("a model that is observed is not measured")


class _Observed(WholeStepWeight):
    """A linear whose weight exists while it is multiplied."""

    def __init__(self, num_rows: int, num_columns: int, see: Callable[[Tensor], LinearWeight]) -> None:
        self.num_rows = num_rows
        self.num_columns = num_columns
        self._see = see

    def multiply(self, x_TK: Tensor, bias_N: Tensor | None, out_dtype: torch.dtype | None, ops: Ops) -> Tensor:
        return self._see(x_TK).multiply(x_TK, bias_N, out_dtype, ops)


class _StoredRows:
    """An embedding that stays in its file."""

    def __init__(self, source: TensorSource, name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.num_rows, self.num_columns = shape
        self._source = source
        self._name = name
        self._dtype = dtype

    def gather(self, ids_T: Tensor, *_: object) -> Tensor:
        rows = self._source.rows(self._name, (self.num_rows, self.num_columns), 0, self.num_rows)
        return rows[ids_T].to(self._dtype)

    def multiply(self, *_: object) -> Tensor:
        raise AssertionError("no logits are asked for")
