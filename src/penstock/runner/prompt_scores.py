"""Log-probabilities of a prompt's tokens: made a piece at a time, and read back when the next step was launched.

Owns: nothing.
Never: waits for the device but in `LatePrompt.entries`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
from torch import Tensor

from penstock.kernels.ops import Ops
from penstock.messages import TokenLogprobs
from penstock.runner.staging import Readback
from penstock.runner.step_device import StepDevice
from penstock.runner.step_tables import Int64
from penstock.sampling import logprob_entries

# The logits of a piece are [rows, vocabulary] float32.
ROWS_PER_PIECE: Final = 64


class LatePrompt(NamedTuple):
    """On their way to the host. pieces: each what Ops.top_logprobs gives for some of the tokens."""

    request_id: str
    num_top: int
    token_ids: Int64
    pieces: list[Readback]

    def entries(self) -> list[TokenLogprobs]:
        """Waits for them."""
        found = [np.concatenate(column) for column in zip(*(piece.arrays() for piece in self.pieces), strict=True)]
        return logprob_entries(self.token_ids.tolist(), found, [self.num_top] * len(self.token_ids))


def score_prompt(
    x_TD: Tensor,
    residual_TD: Tensor,
    num_top: int,
    ids_P: Int64,
    logits: Callable[[Tensor, Tensor], Tensor],
    ops: Ops,
    device: StepDevice,
) -> list[Readback]:
    """Scores ids[p] after row p; P <= T. logits: [T, V] of rows; overwrites the residual that it is given."""

    def score(rows: slice) -> Readback:  # by itself, so that nothing of a piece is held while the next is made
        logits_RV = logits(x_TD[rows], residual_TD[rows].clone())  # sampling reads the residual again
        num_columns = min(num_top, logits_RV.shape[1])
        return Readback(device.backend, ops.top_logprobs(logits_RV, device.send(ids_P[rows]), num_columns))

    count = len(ids_P)
    return [score(slice(begin, min(begin + ROWS_PER_PIECE, count))) for begin in range(0, count, ROWS_PER_PIECE)]
