"""Random numbers that depend on a request's seed and on the output position only: nothing is remembered between draws.

Owns: nothing.
Never: draws from a generator with state.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_MANTISSA = np.uint64(11)  # 64 - 53


def uniforms(seeds_R: NDArray[np.uint64], positions_R: NDArray[np.uint64]) -> NDArray[np.float64]:
    """For each row a number in [0, 1) of (seed, output position): two rounds of the splitmix64 finaliser."""
    mixed_R = _mix(_mix(seeds_R + _GOLDEN) ^ (positions_R * _GOLDEN + _SECOND))
    return (mixed_R >> _MANTISSA).astype(np.float64) * 2.0**-53


def _mix(x_R: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x_R = (x_R ^ (x_R >> np.uint64(30))) * _FIRST
    x_R = (x_R ^ (x_R >> np.uint64(27))) * _SECOND
    return x_R ^ (x_R >> np.uint64(31))
