"""Messages become frames and back without loss or copies; anything else is a WireError."""

import itertools
import math
import subprocess
import sys
import tracemalloc
from typing import Any

import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.messages import (
    HOPS,
    Abort,
    Beat,
    Embeddings,
    GatewayToPreprocess,
    Grant,
    Hello,
    Offer,
    Pixels,
    PreprocessToLlm,
    PreprocessToVision,
    Prompt,
    Stopping,
    Submit,
    VisionToPreprocess,
)
from common.wire import (
    MAX_DIMENSIONS,
    MAX_ERROR_CHARS,
    MAX_FRAMES,
    MAX_HEADER_BYTES,
    NUMPY_DTYPES,
    Buffer,
    Tensor,
    WireError,
    decode,
    encode,
)
from tests.common.samples import MESSAGES, any_message, kinds, sample, tensors_in

MEBIBYTE = 2**20
EVERY_HOP = pytest.mark.parametrize("hop", HOPS, ids="-".join)
EVERY_MESSAGE = pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
WITH_TENSORS = [kind for kind in MESSAGES if tensors_in(sample(kind, Tensor.of_bytes(b"")))]

BYTE = Tensor.of_bytes(b"x")
GRANT = {"type": "Grant", "request_id": "r", "attempt": 1, "item": 0}
PIXELS = {
    "type": "Pixels",
    "request_id": "r",
    "attempt": 1,
    "item": 0,
    "patches": [1, "uint8", [2]],
}


def pixels(patches: Any, *frames: bytes) -> list[Buffer]:
    return [msgpack.packb(PIXELS | {"patches": patches}), *frames]


def header_of(message: msgspec.Struct) -> dict[str, Any]:
    return msgpack.unpackb(encode(message)[0])


# Round trips


@EVERY_HOP
@settings(max_examples=30)
@given(data=st.data())
def test_every_message_of_every_hop_round_trips(hop: tuple[str, str], data: st.DataObject) -> None:
    message = data.draw(st.one_of(*map(any_message, kinds(HOPS[hop]))))
    frames = [memoryview(frame) for frame in encode(message)]
    assert decode(frames, HOPS[hop]) == message


@EVERY_MESSAGE
def test_each_tensor_has_one_frame_and_no_other_field_has_one(kind: type[msgspec.Struct]) -> None:
    message = sample(kind, BYTE)
    assert len(encode(message)) == 1 + len(tensors_in(message))


@pytest.mark.parametrize("kind", WITH_TENSORS, ids=lambda kind: kind.__name__)
def test_the_header_does_not_grow_with_the_tensors(kind: type[msgspec.Struct]) -> None:
    small, large = (encode(sample(kind, Tensor.of_bytes(bytes(size)))) for size in (1, MEBIBYTE))
    # A dimension takes one byte or five.
    assert len(large[0]) - len(small[0]) == 4 * (len(large) - 1)


@EVERY_MESSAGE
def test_the_largest_message_of_a_kind_is_within_the_limits(kind: type[msgspec.Struct]) -> None:
    message = sample(kind, BYTE, largest=True)
    frames = encode(message)
    assert len(frames[0]) <= MAX_HEADER_BYTES // 2 and len(frames) <= MAX_FRAMES // 2
    assert decode(frames, kind) == message


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3), (2, 1, 3, 2)], ids=str)
@pytest.mark.parametrize("dtype", sorted(NUMPY_DTYPES.keys() - {"bfloat16"}))
def test_an_array_round_trips_with_its_shape_and_values(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(math.prod(shape)).astype(dtype).reshape(shape)
    back = decode(
        encode(Pixels(request_id="r", attempt=1, item=0, patches=Tensor.of(array))),
        PreprocessToVision,
    ).patches.numpy()
    assert (back.dtype, back.shape) == (array.dtype, shape)
    np.testing.assert_array_equal(back, array)


def test_bfloat16_is_sent_by_name_and_comes_back_as_its_bits() -> None:
    bits = np.array([[0x3F80, 0xBF80, 0x7F80]], np.uint16)
    message = sample(Embeddings, Tensor("bfloat16", bits.shape, bits.tobytes()))
    back = decode(encode(message), Embeddings).embeddings
    assert back.dtype == "bfloat16"
    np.testing.assert_array_equal(back.numpy(), bits)


@pytest.mark.parametrize(
    "view",
    [lambda a: a.T, lambda a: a[:, ::2], lambda a: a[::-1]],
    ids=["transposed", "strided", "reversed"],
)
def test_a_view_that_is_not_contiguous_travels_in_row_major_order(view: Any) -> None:
    array = view(np.arange(12, dtype=np.int64).reshape(3, 4))
    assert not array.flags.c_contiguous
    np.testing.assert_array_equal(Tensor.of(array).numpy(), array)


@pytest.mark.parametrize("dtype", [">f4", "float64", "uint16", "object"])
def test_an_array_that_the_other_end_would_misread_is_not_sent(dtype: str) -> None:
    with pytest.raises(AssertionError):
        Tensor.of(np.zeros(2, dtype))


def test_encoding_sends_the_memory_of_the_array_itself() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    frame = encode(Pixels(request_id="r", attempt=1, item=0, patches=Tensor.of(array)))[1]
    assert np.shares_memory(np.frombuffer(frame, np.uint8), array)


def test_decoding_returns_read_only_views_of_the_frames() -> None:
    frame = np.arange(6, dtype=np.uint8).tobytes()
    back = decode(pixels([1, "uint8", [2, 3]], frame), PreprocessToVision).patches
    assert back.data is frame
    assert np.shares_memory(back.numpy(), np.frombuffer(frame, np.uint8))
    assert not back.numpy().flags.writeable


def test_text_and_bytes_round_trip() -> None:
    assert Tensor.of_text("größer 漢字 \x00").text() == "größer 漢字 \x00"
    assert Tensor.of_bytes(b"\xff\x00").bytes() == b"\xff\x00"


def test_a_header_that_would_be_refused_is_not_sent() -> None:
    with pytest.raises(AssertionError, match="belongs into a tensor"):
        encode(Abort(request_id="x" * MAX_HEADER_BYTES, attempt=0))


# What is no message


@pytest.mark.parametrize(
    ("patches", "frame"),
    [
        ([1, "uint8", [3]], b"ab"),
        ([1, "uint8", [1]], b"ab"),
        ([1, "int64", [2]], b"ab"),
        ([1, "uint8", []], b"ab"),
        ([1, "uint8", [-2]], b"ab"),
        ([1, "uint8", [-1, -2]], b"ab"),
        ([1, "uint8", [0, -1]], b""),
        ([1, "int64", [2**62, 4]], b""),
        ([1, "uint8", [2**63, 2]], b""),
        ([1, "uint8", [2**63] * MAX_DIMENSIONS], b"ab"),
        ([1, "uint8", [2, *[1] * MAX_DIMENSIONS]], b"ab"),
        ([1, "uint8", [2.0]], b"ab"),
        ([1, "uint8", [True, 2]], b"ab"),
        ([1, "uint8", ["2"]], b"ab"),
        ([1, "uint8", [[2]]], b"ab"),
        ([1, "uint8", [None]], b"ab"),
        ([1, "uint8", 2], b"ab"),
        ([1, "uint8", "2"], b"ab"),
        ([1, "uint8", {"0": 2}], b"ab"),
        ([1, "uint16", [1]], b"ab"),
        ([1, "object", [2]], b"ab"),
        ([1, "x" * 4000, [2]], b"ab"),
        ([1, "", [2]], b"ab"),
        ([1, 8, [2]], b"ab"),
        ([1, ["uint8"], [2]], b"ab"),
        ([0, "uint8", [2]], b"ab"),
        ([2, "uint8", [2]], b"ab"),
        ([-1, "uint8", [2]], b"ab"),
        ([2**64 - 1, "uint8", [2]], b"ab"),
        ([True, "uint8", [2]], b"ab"),
        ([1.0, "uint8", [2]], b"ab"),
        (["1", "uint8", [2]], b"ab"),
        ([None, "uint8", [2]], b"ab"),
        ([1, "uint8", [2], 0], b"ab"),
        ([1, "uint8"], b"ab"),
        ([], b"ab"),
        ({}, b"ab"),
        (None, b"ab"),
        ("ab", b"ab"),
        (1, b"ab"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_tensor_that_does_not_fit_its_frame_is_refused(patches: Any, frame: bytes) -> None:
    with pytest.raises(WireError):
        decode(pixels(patches, frame), PreprocessToVision)


@pytest.mark.parametrize(
    "frames",
    [[], [b"ab", b""], [b"ab"] * 2, [b"ab"] * MAX_FRAMES],
    ids=lambda frames: f"{len(frames)} frames",
)
def test_each_frame_must_be_used(frames: list[bytes]) -> None:
    with pytest.raises(WireError):
        decode(pixels([1, "uint8", [2]], *frames), PreprocessToVision)


def test_a_message_without_frames_is_refused() -> None:
    with pytest.raises(WireError):
        decode([], PreprocessToVision)


def test_a_frame_is_used_once() -> None:
    frames = encode(sample(Submit, BYTE))
    header = msgpack.unpackb(frames[0])
    header["items"] = [{"kind": "image", "data": header["prompt"]}]
    with pytest.raises(WireError, match="used twice"):
        decode([msgpack.packb(header), *frames[1:]], GatewayToPreprocess)


@EVERY_MESSAGE
def test_a_truncated_header_is_refused(kind: type[msgspec.Struct]) -> None:
    header, *frames = encode(sample(kind, BYTE))
    for length in range(len(header)):
        with pytest.raises(WireError):
            decode([header[:length], *frames], kind)


@pytest.mark.parametrize(
    "header",
    [
        b"\x00",
        b"\xc0",
        b"\x90",
        b"\x80",
        b"\xa5Grant",
        b"\xc1",
        msgpack.packb(GRANT) + b"\xc0",
        msgpack.packb(GRANT).replace(b"\xa1r", b"\xa1\xff"),
        msgpack.packb(GRANT | {"request_id": b"r"}),
        msgpack.packb(GRANT | {"request_id": msgpack.ExtType(5, b"r")}),
        msgpack.packb(GRANT | {"request_id": msgpack.Timestamp(1)}),
        b"\x81\xc7\x00\xff\x01",
        b"\x81\x01\x02",
        b"\x81\xc0\x02",
        b"\x81\x90\x02",
        b"\x91" * 900,
        b"\x91" * MAX_HEADER_BYTES,
        b"\x81\xa1x" * 20000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdd" + (50_000).to_bytes(4) + b"\xc0" * 50_000,
        b"\x00" * (MAX_HEADER_BYTES + 1),
    ],
    ids=lambda header: header[:8].hex() + f" {len(header)}",
)
def test_a_header_that_is_not_a_message_is_refused(header: bytes) -> None:
    with pytest.raises(WireError):
        decode([header], VisionToPreprocess)


def test_a_header_beyond_its_limit_is_refused_for_its_size() -> None:
    with pytest.raises(WireError, match="at most 65536"):
        decode([msgpack.packb(GRANT) + b" " * MAX_HEADER_BYTES], VisionToPreprocess)


@pytest.mark.parametrize(
    "start", [b"\xdd", b"\xdf", b"\xdb", b"\xc6"], ids=["array", "map", "text", "bytes"]
)
@pytest.mark.parametrize("field", ["image", "patches"])
def test_no_memory_is_allocated_for_what_a_header_only_claims_to_hold(
    field: str, start: bytes
) -> None:
    claim = start + b"\x7f\xff\xff\xff"
    header = msgpack.packb({**PIXELS, field: "here"}).replace(b"\xa4here", claim)
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            decode([header, b"xx"], PreprocessToVision)
        assert tracemalloc.get_traced_memory()[1] < MEBIBYTE
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "change",
    [
        {"type": "Nothing"},
        {"type": "Submit"},
        {"type": None},
        {"type": 1},
        {"type": ["Grant"]},
        {"attempt": True},
        {"attempt": 1.0},
        {"attempt": "1"},
        {"attempt": None},
        {"attempt": -1},
        {"attempt": 2**48 + 1},
        {"attempt": 2**64 - 1},
        {"request_id": 1},
        {"request_id": "x" * 201},
        {"item": []},
        {"unknown": 1},
    ],
    ids=repr,
)
def test_a_message_that_does_not_fit_its_type_is_refused(change: dict[str, Any]) -> None:
    assert isinstance(decode([msgpack.packb(GRANT)], VisionToPreprocess), Grant)
    with pytest.raises(WireError):
        decode([msgpack.packb(GRANT | change)], VisionToPreprocess)


@pytest.mark.parametrize("field", GRANT)
def test_a_message_without_a_required_field_is_refused(field: str) -> None:
    with pytest.raises(WireError):
        decode(
            [msgpack.packb({name: value for name, value in GRANT.items() if name != field})],
            VisionToPreprocess,
        )


@EVERY_HOP
def test_a_hop_accepts_only_its_own_messages(hop: tuple[str, str]) -> None:
    own = kinds(HOPS[hop])
    assert own[0] is Hello
    for kind in MESSAGES:
        frames = encode(sample(kind, BYTE))
        if kind in own:
            assert isinstance(decode(frames, HOPS[hop]), kind)
        else:
            with pytest.raises(WireError):
                decode(frames, HOPS[hop])


@pytest.mark.parametrize(
    "seconds",
    [math.nan, math.inf, -math.inf, -1.0, -1e-300, 1e10, 2**64 - 1, True, "1", None],
    ids=repr,
)
def test_an_invalid_number_of_seconds_is_refused(seconds: Any) -> None:
    offer = header_of(sample(Offer, BYTE))
    with pytest.raises(WireError):
        decode([msgpack.packb(offer | {"timeout": seconds})], PreprocessToVision)


@pytest.mark.parametrize(
    ("group", "field", "value"),
    [
        ("sampling", "temperature", math.nan),
        ("sampling", "temperature", math.inf),
        ("sampling", "top_p", math.nan),
        ("sampling", "top_p", -0.1),
        ("sampling", "repetition_penalty", -math.inf),
        ("sampling", "presence_penalty", math.nan),
        ("sampling", "top_k", True),
        ("sampling", "seed", 2**63),
        ("sampling", "num_logprobs", 21),
        ("stopping", "ignore_eos", 1),
        ("stopping", "max_tokens", 0),
        ("stopping", "stop", [""]),
        ("stopping", "stop", ["x"] * 17),
        ("stopping", "stop", ["x" * 257]),
        ("stopping", "stop_token_ids", [1] * 65),
        ("stopping", "unknown", 1),
    ],
)
def test_sampling_and_stopping_are_checked_on_the_wire_too(
    group: str, field: str, value: Any
) -> None:
    header, *frames = encode(sample(Prompt, BYTE))
    prompt = msgpack.unpackb(header)
    assert isinstance(decode([msgpack.packb(prompt), *frames], PreprocessToLlm).stopping, Stopping)
    prompt[group][field] = value
    with pytest.raises(WireError):
        decode([msgpack.packb(prompt), *frames], PreprocessToLlm)


@pytest.mark.parametrize(
    "change", [{"type": "x" * 60_000}, {"x" * 60_000: 1}], ids=["tag", "field"]
)
def test_an_error_does_not_quote_its_input_at_length(change: dict[str, Any]) -> None:
    with pytest.raises(WireError) as caught:
        decode([msgpack.packb(GRANT | change)], VisionToPreprocess)
    assert len(str(caught.value)) <= MAX_ERROR_CHARS


FLOOD = """
import os, resource
from common.messages import PreprocessToVision
from common.wire import WireError, decode

size = 20 * 2**20
floods = {nonsense}
small = b"\\xdd" + (60000).to_bytes(4) + b"\\x90" * 60000
memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = memory()
refused = 0
for frames in [[flood] for flood in floods] + [[small, flood] for flood in floods] + [[small]]:
    try:
        decode(frames, PreprocessToVision)
    except WireError:
        refused += 1
print(refused, memory() - before)
"""
NONSENSE = (
    r'[b"\x90" * size, b"\x91" * size, b"\xdd" + size.to_bytes(4) + b"\x90" * '
    r'size, b"\x81\xa1x" * (size // 3), os.urandom(size)]'
)


def test_twenty_megabytes_of_nonsense_use_no_memory() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FLOOD.format(nonsense=NONSENSE)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    refused, kibibytes = map(int, done.stdout.split())
    assert refused == 11
    assert kibibytes < 8 * 1024


# Whatever comes is a message or a WireError


def read(frames: list[Buffer], union: Any) -> None:
    try:
        message = decode(frames, union)
    except WireError:
        return
    assert isinstance(message, kinds(union))
    assert decode(encode(message), union) == message


unions = st.sampled_from(list(HOPS.values()))


@settings(max_examples=200)
@given(unions, st.lists(st.binary(max_size=40), max_size=4))
def test_random_frames_do_no_harm(union: Any, frames: list[Buffer]) -> None:
    read(frames, union)


@settings(max_examples=300)
@given(st.data())
def test_bytes_changed_in_a_good_header_do_no_harm(data: st.DataObject) -> None:
    union = data.draw(unions)
    header, *frames = encode(sample(data.draw(st.sampled_from(kinds(union))), BYTE))
    start = data.draw(st.integers(0, len(header)))
    stop = data.draw(st.integers(start, min(len(header), start + 4)))
    read([header[:start] + data.draw(st.binary(max_size=4)) + header[stop:], *frames], union)


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=2)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
)


@settings(max_examples=300)
@given(st.data())
def test_a_field_changed_in_a_good_header_does_no_harm(data: st.DataObject) -> None:
    union = data.draw(unions)
    header, *frames = encode(sample(data.draw(st.sampled_from(kinds(union))), BYTE))
    fields = msgpack.unpackb(header)
    place: Any = fields
    for _ in itertools.repeat(None, data.draw(st.integers(0, 2))):
        inner = [
            item
            for item in (place.values() if isinstance(place, dict) else place)
            if isinstance(item, dict | list) and item
        ]
        place = data.draw(st.sampled_from(inner)) if inner else place
    place[
        data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
    ] = data.draw(values)
    read([msgpack.packb(fields), *frames], union)


@pytest.mark.parametrize("name", ["r\nforged", "r\x1b[31m", "r\x00", "r\u2028", "r\n"])
def test_a_name_with_control_characters_is_refused(name: str) -> None:
    header = msgpack.packb({"type": "Abort", "request_id": name, "attempt": 1})
    with pytest.raises(WireError):
        decode([header], Abort)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, 1e300])
def test_seconds_that_are_not_a_duration_are_refused(seconds: float) -> None:
    with pytest.raises(WireError):
        decode([msgpack.packb({"type": "Beat", "hung_seconds": seconds})], Beat)
