"""The bounds of a gRPC request, before objects are built from it."""

import pytest

from common.errors import InvalidRequest
from proto.twinlens.inference.v1 import inference_pb2
from services.gateway import grpc_wire
from services.gateway.grpc_wire import split_media

CONTEXT = 100


def number(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(tag: int, value: bytes) -> bytes:
    return number(tag << 3 | 2) + number(len(value)) + value


def ids(count: int) -> bytes:
    return field(4, field(1, b"\x01" * count))


def test_the_images_are_views_and_the_rest_is_unchanged() -> None:
    request = inference_pb2.GenerateRequest(
        text="hi",
        images=[inference_pb2.Image(data=b"one"), inference_pb2.Image()],
        sampling=inference_pb2.SamplingParams(temperature=0.5, seed=2**64 - 1),
        guide=inference_pb2.GuideParams(regex="a+"),
    )
    data = request.SerializeToString()
    rest, images = split_media(data, CONTEXT)
    assert images == (b"one", b"")
    assert isinstance(images[0], memoryview) and images[0].obj is data
    del request.images[:]
    assert inference_pb2.GenerateRequest.FromString(rest) == request


def test_an_image_is_read_as_protobuf_reads_it() -> None:
    """The last value counts, and a field of another type is an unknown one."""
    image = field(1, b"first") + field(1, b"last") + b"\x08\x01" + field(7, b"unknown")
    data = field(5, image)
    assert split_media(data, CONTEXT).media == (b"last",)
    assert inference_pb2.GenerateRequest.FromString(data).images[0].data == b"last"


@pytest.mark.parametrize("data", [ids(CONTEXT), field(4, b"\x08\x01" * CONTEXT), ids(50) * 2])
def test_a_context_full_of_token_ids_passes(data: bytes) -> None:
    request = inference_pb2.GenerateRequest.FromString(split_media(data, CONTEXT).request)
    assert len(request.token_ids.ids) == CONTEXT


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        pytest.param(ids(CONTEXT + 1), "length is 100 tokens. Your token_ids are more", id="ids"),
        pytest.param(
            ids(60) + ids(60),
            "length is 100 tokens. Your token_ids are more",
            id="ids in two fields",
        ),
        pytest.param(
            field(4, b"\x08\x01" * 101),
            "length is 100 tokens. Your token_ids are more",
            id="unpacked ids",
        ),
        pytest.param(
            ids(2_000_000), "length is 100 tokens. Your token_ids are more", id="far too many ids"
        ),
        pytest.param(
            field(3, b"a" * 25_601),
            "length is 100 tokens. The text has more than 25600 bytes",
            id="text",
        ),
        pytest.param(
            field(3, b"a" * 20_000) * 2, "The text has more than", id="text in two fields"
        ),
        pytest.param(field(2, b"a" * 70_000), "model: more than", id="model"),
        pytest.param(field(1, b"a" * 70_000), "request_id: more than", id="request_id"),
        pytest.param(field(99, b"a" * 70_000), "other fields: more than", id="unknown field"),
        pytest.param(field(5, b"") * 33, "more than 32 images", id="images"),
        pytest.param(b"\x7a\x00" * 30_000, "fields; send fewer", id="empty unknown fields"),
        pytest.param(field(5, b"\x10\x01" * 9000), "fields; send fewer", id="fields in an image"),
        pytest.param(field(4, b"\x10\x01" * 9000), "token_ids", id="unknown fields with the ids"),
        pytest.param(field(7, b"\x22\x00" * 9000), "fields; send fewer", id="stop strings"),
        pytest.param(field(9, field(2, b"a" * 5_000_000)), "guide: more than", id="guide"),
        pytest.param(b"\x0b\x0c", "not a message", id="a group"),
        pytest.param(b"\x1a\x05hi", "not a message", id="truncated"),
        pytest.param(b"\x18" + b"\xff" * 11, "not a message", id="endless number"),
        pytest.param(b"\x00\x00", "not a message", id="field 0"),
        pytest.param(b"\x0e\x00", "not a message", id="a type that does not exist"),
        pytest.param(b"\x1d\x00", "not a message", id="truncated fixed number"),
        pytest.param(field(5, b"\x0a\x05hi"), "not a message", id="truncated in an image"),
    ],
)
def test_what_is_beyond_its_bound_is_refused_before_it_is_unpacked(
    data: bytes, problem: str
) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        split_media(data, CONTEXT)


def test_without_a_known_context_the_default_is_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_wire, "DEFAULT_CONTEXT", CONTEXT)
    split_media(ids(CONTEXT), None)
    with pytest.raises(InvalidRequest, match="token_ids"):
        split_media(ids(CONTEXT + 1), None)
