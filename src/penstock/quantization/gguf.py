"""GGUF's tensor types as they are stored: blocks are repacked once, never converted to floats.

Types without a kernel (IQ1 to IQ3) become floats of the model's dtype at load, which a notice says.
"""

from __future__ import annotations

import logging

from penstock.kernels.ops import Ops
from penstock.kernels.quantized import GGUF_LAYOUTS, QuantizedLinear, WeightLayout
from penstock.loader.gguf_file import TYPE_IDS
from penstock.quantization import gguf_types
from penstock.quantization.stored_format import MAPPED_PIECE_ELEMENTS, StoredFormat, row_pieces
from penstock.quantization.tensor_source import TensorSource

_log = logging.getLogger(__name__)


def is_block_type(kind: str) -> bool:
    """Whether a tensor type is a quantised one."""
    return kind in TYPE_IDS and kind not in gguf_types.FLOAT_TYPES


class GGUFFormat(StoredFormat):
    """tensor_types: of every tensor by its Hugging Face name."""

    def layout(self, name: str, num_columns: int) -> WeightLayout | None:  # noqa: ARG002  the signature is the base's
        return GGUF_LAYOUTS.get(TYPE_IDS.get(self._types.get(f"{name}.weight", ""), -1))

    def pack_rows(
        self, source: TensorSource, name: str, shape: tuple[int, int], packed: QuantizedLinear, first_row: int, ops: Ops
    ) -> None:
        tensor, type_id = f"{name}.weight", TYPE_IDS[self._types[f"{name}.weight"]]
        for begin, end in row_pieces(*shape, MAPPED_PIECE_ELEMENTS):
            ops.pack_gguf(packed, first_row + begin, source.stored(tensor, shape, begin, end), type_id)
            source.release(tensor, begin, end)

    def report_widened(self) -> None:
        widened = sorted(
            {kind for kind in self._types.values() if is_block_type(kind) and TYPE_IDS[kind] not in GGUF_LAYOUTS}
        )
        if widened:
            _log.warning(
                "Tensors of type %s have no kernel: they are held as %s and take more memory than the file.",
                ", ".join(widened),
                str(self.dtype).removeprefix("torch."),
            )
