"""A file whose size and layout are known before its content: written piece by piece, and resumed where it stopped.

Owns: OUT.part, until it is whole and becomes OUT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from penstock.base.errors import ConfigError

Pieces = Callable[[], Iterable[memoryview | bytes]]


class Section(NamedTuple):
    """A tensor: its bytes with padding, and what makes its pieces in order (padding is added)."""

    nbytes: int
    pieces: Pieces


def write_file(path: Path, header: bytes, sections: Sequence[Section], on_progress: Callable[[float], None]) -> None:
    """Writes `path`. A PATH.part that begins with the same header is continued after its last whole section.

    on_progress: gets the share of the bytes that are written. Raises ConfigError when `path` is there already.
    """
    if path.exists():
        raise ConfigError(f"{path} is there already.", remedy="Name another output, or remove it.")
    part = path.with_name(f"{path.name}.part")
    total = len(header) + sum(section.nbytes for section in sections)
    with part.open("r+b" if part.exists() else "w+b") as file:
        begin = len(header)
        first = 0
        if file.read(len(header)) == header:
            size = part.stat().st_size
            while first < len(sections) and begin + sections[first].nbytes <= size:
                begin += sections[first].nbytes
                first += 1
        else:
            file.seek(0)
            file.write(header)
        file.seek(begin)
        file.truncate()
        for section in sections[first:]:
            end = file.tell() + section.nbytes
            for piece in section.pieces():
                file.write(piece)
                on_progress(file.tell() / total)
            assert file.tell() <= end, "a section is longer than planned"
            file.write(bytes(end - file.tell()))
    part.rename(path)
    on_progress(1.0)
