"""multipart/form-data (RFC 7578) of a body that is in memory. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from penstock.base.errors import ValidationError

MAX_PARTS: Final = 32
_BOUNDARY: Final = re.compile(rb'boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))')
_NAME: Final = re.compile(rb'[;\s]name="([^"]*)"')
_FILENAME: Final = re.compile(rb'[;\s]filename="([^"]*)"')


@dataclass(frozen=True, slots=True)
class FormPart:
    """One field. filename: empty where it is no file."""

    data: bytes
    filename: str = ""


def parse_form(body: bytes, content_type: bytes) -> dict[str, FormPart]:
    """The fields by name. Raises ValidationError."""
    match = _BOUNDARY.search(content_type)
    if not content_type.lower().startswith(b"multipart/form-data") or match is None:
        raise ValidationError("The body must be multipart/form-data.", param="body")
    mark = b"\r\n--" + (match[1] or match[2])
    pieces = (b"\r\n" + body).split(mark, MAX_PARTS + 2)
    if len(pieces) < 2 or len(pieces) > MAX_PARTS + 2 or not pieces[-1].startswith(b"--"):
        raise ValidationError(f"The form is malformed, or has more than {MAX_PARTS} fields.", param="body")
    fields: dict[str, FormPart] = {}
    for piece in pieces[1:-1]:
        head, found, data = piece.partition(b"\r\n\r\n")
        name = _NAME.search(head)
        if not found or name is None:
            raise ValidationError("The form has a field without a name.", param="body")
        filename = _FILENAME.search(head)
        text = filename[1].decode("utf-8", "replace") if filename is not None else ""
        fields[name[1].decode("utf-8", "replace")] = FormPart(data, text)
    return fields
