"""Framing and encoding of messages: a 4-byte little-endian length, then msgpack. Bytes in, messages out; no I/O.

msgspec decodes into declared types only, so a frame can carry data but never code (docs/decisions/0002).
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec

from penstock.messages.engine import EngineInput, EngineMessage

MAX_FRAME_BYTES: Final = 256 * 1024 * 1024
_LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()
_input_decoder: msgspec.msgpack.Decoder[EngineInput] = msgspec.msgpack.Decoder(EngineInput)
_message_decoder: msgspec.msgpack.Decoder[EngineMessage] = msgspec.msgpack.Decoder(EngineMessage)


def encode_frame(message: EngineInput | EngineMessage) -> bytes:
    """One framed message, ready to be written to a stream."""
    return frame(_encoder.encode(message))


def frame(body: bytes) -> bytes:
    """A body with its length in front."""
    assert len(body) <= MAX_FRAME_BYTES
    return _LENGTH.pack(len(body)) + body


def decode_input(body: bytes | memoryview) -> EngineInput:
    return _input_decoder.decode(body)


def decode_message(body: bytes | memoryview) -> EngineMessage:
    return _message_decoder.decode(body)


class FrameBuffer:
    """Turns a byte stream, in pieces of any size, into frame bodies."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Adds received bytes and returns the bodies that are now complete, in order."""
        buffer = self._buffer
        buffer += data
        bodies: list[bytes] = []
        start = 0
        while len(buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"A frame of {length} bytes exceeds the limit of {MAX_FRAME_BYTES}.")
            end = start + _LENGTH.size + length
            if len(buffer) < end:
                break
            bodies.append(bytes(buffer[start + _LENGTH.size : end]))
            start = end
        if start:
            del buffer[:start]
        return bodies
