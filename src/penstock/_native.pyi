"""The compiled kernels. Arguments are data_ptr() integers and sizes; nothing is checked there, see kernels/native."""

def kernels(isa: str = "") -> Kernels:
    """The kernels of one instruction set, or of the best that works here. ValueError, RuntimeError: it cannot be."""

def isa_statuses() -> list[tuple[str, bool, str]]:
    """(name, works, why not) of every instruction set compiled in, lowest first."""

def max_threads() -> int:
    """How many threads OpenMP would use."""

class Kernels:
    @property
    def isa(self) -> str: ...
    # linear
    def linear(
        self,
        x: int,
        weight: int,
        bias: int,
        out: int,
        m: int,
        n: int,
        k: int,
        dtype: int,
        out_dtype: int,
        num_threads: int,
        /,
    ) -> None: ...
    def pack(
        self,
        source: int,
        packed: int,
        first_row: int,
        rows: int,
        k: int,
        source_dtype: int,
        dtype: int,
        num_threads: int,
        /,
    ) -> None: ...
    def embedding(
        self, ids: int, weight: int, out: int, tokens: int, k: int, dtype: int, num_threads: int, /
    ) -> None: ...
