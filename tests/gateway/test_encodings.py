"""The forms in which a body may come: content types, encodings, and byte order marks."""

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from services.gateway import encodings
from services.gateway.body_budget import BodyBudget
from services.gateway.encodings import MAX_MEMBERS, decoded
from services.gateway.metrics import MeasuredCore
from services.gateway.openai_http import create_app
from tests.gateway.fake_core import FakeCore

PATHS = ["/v1/chat/completions", "/v1/embeddings", "/v1/classify", "/v1/load_lora_adapter"]
CHAT = PATHS[0]
BODY = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()
LIMIT = 200_000
JSON = {"content-type": "application/json"}


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


def stored(data: bytes) -> bytes:
    packer = zlib.compressobj(0, wbits=-15)
    return packer.compress(data) + packer.flush()


@pytest.fixture
def budget() -> BodyBudget:
    return BodyBudget()


@pytest.fixture
def core() -> FakeCore:
    return FakeCore()


@pytest.fixture
def client(core: FakeCore, budget: BodyBudget) -> Iterator[TestClient]:
    with TestClient(create_app(MeasuredCore(core), LIMIT, budget)) as client:
        yield client


def post(client: TestClient, body: bytes, encoding: str = "", **headers: str) -> Any:
    sent = JSON | {name.replace("_", "-"): value for name, value in headers.items()}
    if encoding:
        sent["content-encoding"] = encoding
    return client.post(CHAT, content=body, headers=sent)


PACKED = {
    "gzip": gzip.compress(BODY),
    "GZip": gzip.compress(BODY),
    "x-gzip": gzip.compress(BODY[:9]) + gzip.compress(b"") + gzip.compress(BODY[9:]),
    "deflate": zlib.compress(BODY),
    "deflate ": raw_deflate(BODY),
    " deflate": stored(BODY),
    "identity": BODY,
    "identity, gzip": gzip.compress(BODY),
}


@pytest.mark.parametrize("encoding", PACKED)
def test_an_encoded_body_is_decoded(client: TestClient, core: FakeCore, encoding: str) -> None:
    assert post(client, PACKED[encoding], encoding).status_code == 200
    assert b'"hi"' in core.requests[0].prompt


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress, raw_deflate])
def test_a_body_that_grows_beyond_the_limit_is_refused(
    client: TestClient, budget: BodyBudget, pack: Any
) -> None:
    encoding = "gzip" if pack is gzip.compress else "deflate"
    fits = BODY[:-1] + b" " * (LIMIT - len(BODY)) + b"}"
    assert post(client, pack(fits), encoding).status_code == 200
    for size in (LIMIT + 1, 100 * LIMIT):
        bomb = BODY[:-1] + b" " * (size - len(BODY)) + b"}"
        answer = post(client, pack(bomb), encoding)
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "too_large"
    assert budget.num_held == 0


def test_the_bytes_of_a_decoded_body_are_counted() -> None:
    body = BODY[:-1] + b" " * 150_000 + b"}"
    for room, status in [(160_000, 429), (320_000, 200)]:
        budget = BodyBudget(room)
        client = TestClient(create_app(MeasuredCore(FakeCore()), LIMIT, budget))
        answer = post(client, gzip.compress(body), "gzip")
        assert (answer.status_code, budget.num_held) == (status, 0)


BROKEN = [
    ("gzip", b""),
    ("deflate", b""),
    ("gzip", b"\x1f"),
    ("gzip", BODY),
    ("deflate", BODY),
    ("gzip", gzip.compress(BODY)[:-1]),
    ("deflate", zlib.compress(BODY)[:-1]),
    ("deflate", raw_deflate(BODY)[:-1]),
    ("gzip", gzip.compress(BODY) + b"x"),
    ("gzip", gzip.compress(BODY) + b"\0" * 20),
    ("gzip", gzip.compress(BODY) + gzip.compress(BODY)[:5]),
    ("deflate", zlib.compress(BODY) + b"x"),
    ("deflate", zlib.compress(BODY) * 2),
    ("deflate", raw_deflate(BODY) + b"x"),
    ("deflate", gzip.compress(BODY)),
    ("gzip", zlib.compress(BODY)),
    ("gzip", gzip.compress(BODY)[:-6] + bytes(6)),
    ("gzip", gzip.compress(b"") * (MAX_MEMBERS + 1)),
]


@pytest.mark.parametrize(("encoding", "body"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_encoding_is_named(client: TestClient, encoding: str, body: bytes) -> None:
    answer = post(client, body, encoding)
    assert answer.status_code == 400
    assert f"the {encoding} body" in answer.json()["error"]["message"]


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "gzip, gzip", "deflate,br", "ſ"])
def test_an_encoding_that_is_not_read_is_named_with_those_that_are(
    client: TestClient, encoding: str
) -> None:
    answer = client.post(
        CHAT, content=BODY, headers=[(b"content-encoding", encoding.encode("utf-8"))]
    )
    assert answer.status_code == 415
    message = answer.json()["error"]["message"]
    assert "gzip, deflate" in message
    if encoding.isascii():
        assert all(name in message for name in encoding.replace(",", " ").split())


def test_decoding_is_bounded_at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encodings, "OUTPUT_BYTES", 1000)
    monkeypatch.setattr(encodings, "INPUT_BYTES", 10)
    data = bytes(range(256)) * 300
    for packed in (gzip.compress(data), gzip.compress(data[:99]) + gzip.compress(data[99:])):
        pieces = list(decoded(packed, "gzip"))
        assert max(map(len, pieces)) <= 1000 and b"".join(pieces) == data


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 400),
        ("Application/JSON; Charset=UTF-8", 400),
        ('application/vnd.api+json;charset="utf8"', 400),
        (None, 400),
        ("", 400),
        ("text/plain;charset=UTF-8", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("text/json", 415),
        ("application/jsonp", 415),
        ("application/json; charset=utf-16", 415),
        ("application/json, text/plain", 415),
    ],
)
def test_only_json_is_read(client: TestClient, kind: str | None, status: int) -> None:
    headers = {} if kind is None else {"content-type": kind}
    for path in PATHS:
        answer = client.post(path, content=b"{", headers=headers)
        code = answer.json()["error"]["code"]
        if status == 415:
            assert (answer.status_code, code) == (415, "unsupported_media_type")
        else:
            assert (answer.status_code, code) == (400, "invalid_request"), "the text is looked at"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_utf_8_may_have_a_mark_and_other_encodings_are_named(
    client: TestClient, encoding: str
) -> None:
    for path in PATHS:
        marked = client.post(path, content=b"\xef\xbb\xbf{", headers=JSON)
        assert "not valid JSON: EOF" in marked.json()["error"]["message"]
        answer = client.post(path, content=BODY.decode().encode(encoding), headers=JSON)
        assert answer.status_code == 400
        assert encoding[:6].upper() in answer.json()["error"]["message"]


def test_a_marked_body_is_answered(client: TestClient) -> None:
    assert post(client, b"\xef\xbb\xbf" + BODY).status_code == 200
