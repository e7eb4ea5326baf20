"""What the host tier of the KV cache costs a simulated device: copies take the time of their bytes over a link.

Which blocks go where is the real cache's decision (kvcache/host_tier.py); when copies begin and what waits for them is
the order of runner/host_blocks.py.
"""

from __future__ import annotations

from penstock.messages import SchedulerOutput


class HostLink:
    """One queue of copies beside the steps. block_s: seconds of one block, in either direction.

    Owns: when the copies that it was given end.
    """

    __slots__ = ("_arrived_s", "_block_s", "_free_s", "_last_end_s")

    def __init__(self, block_s: float) -> None:
        self._block_s = block_s
        self._free_s = 0.0
        self._arrived_s = 0.0  # what the next step reads
        self._last_end_s = 0.0

    def step_start(self, output: SchedulerOutput, given_s: float, last_end_s: float) -> float:
        """When a step begins that the device is given at `given_s`, after one that ends at `last_end_s`."""
        before_s, self._last_end_s = self._last_end_s, last_end_s
        start_s = max(given_s, last_end_s, self._arrived_s)
        if output.offloads:
            # Of steps that are finished; this one overwrites them.
            start_s = max(start_s, self._copy(len(output.offloads), max(given_s, before_s)))
        if output.restores:
            # To where the last step may still write; the step after this one reads them, unless this one does.
            self._arrived_s = self._copy(len(output.restores), max(given_s, last_end_s))
            if output.awaits_restores:
                start_s = max(start_s, self._arrived_s)
        return start_s

    def _copy(self, num_blocks: int, begin_s: float) -> float:
        self._free_s = max(self._free_s, begin_s) + num_blocks * self._block_s
        return self._free_s
