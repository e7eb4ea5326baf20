"""Frames survive any cutting of the byte stream, and every message survives the trip."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.base.errors import QueueFullError, ValidationError
from penstock.messages import (
    AbortRequest,
    EngineFatal,
    EngineReady,
    EngineRequest,
    EngineStats,
    ErrorInfo,
    FinishReason,
    OutputBatch,
    RequestOutput,
    RequestTimings,
    SamplingParams,
    ShutdownRequest,
    StartupProgress,
    TokenLogprobs,
)
from penstock.messages.wire import MAX_FRAME_BYTES, FrameBuffer, decode_input, decode_message, encode_frame, frame


@given(st.lists(st.binary(max_size=300), max_size=8), st.data())
def test_frames_survive_any_cutting(bodies: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(frame(body) for body in bodies)
    buffer, received = FrameBuffer(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        received += buffer.feed(stream[:size])
        stream = stream[size:]
    assert received == bodies


def test_an_absurd_length_is_refused() -> None:
    with pytest.raises(ValueError, match="exceeds the limit"):
        FrameBuffer().feed((MAX_FRAME_BYTES + 1).to_bytes(4, "little"))


@pytest.mark.parametrize(
    "message",
    [
        EngineRequest(
            request_id="r",
            prompt_token_ids=[1, 2, 3],
            sampling=SamplingParams(temperature=0.5, seed=7, logit_bias={3: -1.0}, stop=("x",)),
            max_tokens=5,
            stop_token_ids=(2,),
            deadline_s=1.5,
        ),
        AbortRequest(["a", "b"], FinishReason.STOP),
        ShutdownRequest(2.0),
    ],
)
def test_inputs_round_trip(message: msgspec.Struct) -> None:
    (body,) = FrameBuffer().feed(encode_frame(message))
    assert decode_input(body) == message


@pytest.mark.parametrize(
    "message",
    [
        OutputBatch(
            [
                RequestOutput("r", [1], [TokenLogprobs(1, -0.5, 1, [1], [-0.5])]),
                RequestOutput("s", finish_reason=FinishReason.LENGTH, timings=RequestTimings(1.0)),
            ],
            EngineStats(num_running=3),
        ),
        StartupProgress("load weights", 0.5),
        EngineReady(
            max_model_len=10, vocab_size=5, block_size=16, num_blocks=3, max_num_seqs=2, max_num_batched_tokens=8,
            dtype="float32", instruction_set="avx2", phases=[("a", 0.1)],
        ),
        EngineFatal(ErrorInfo("x", 500, "y")),
    ],
)  # fmt: skip
def test_messages_round_trip(message: msgspec.Struct) -> None:
    (body,) = FrameBuffer().feed(encode_frame(message))
    assert decode_message(body) == message


def test_a_frame_of_another_type_is_refused() -> None:
    (body,) = FrameBuffer().feed(encode_frame(AbortRequest(["a"])))
    with pytest.raises(msgspec.ValidationError):
        decode_message(body)


def test_error_info_keeps_what_a_client_may_know() -> None:
    full = ErrorInfo.of(QueueFullError("Full.", retry_after_s=3.0))
    assert (full.code, full.status, full.retry_after_s) == ("queue_full", 429, 3.0)
    assert ErrorInfo.of(ValidationError("Bad.", param="n")).param == "n"
    unforeseen = ErrorInfo.of(KeyError("the prompt was: secret"))
    assert unforeseen.status == 500
    assert "secret" not in unforeseen.message
