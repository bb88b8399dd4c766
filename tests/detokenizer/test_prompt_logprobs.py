"""Log-probabilities of a prompt go out with the first piece, and malformed ones do no harm."""

import json
from typing import Any

import numpy as np
import pytest

from common.events import Event
from common.messages import MAX_PROMPT_LOGPROBS, Failed, Start, Stopping, Usage
from common.wire import Tensor
from tests.detokenizer.test_worker import VOCABULARY, Detokenizer, ids_of, tokens
from tests.fakes import received

A, B = ids_of("ab")
OUTSIDE = 10**6
PROMPT = [A, B, OUTSIDE]


def floats(*values: Any) -> Tensor:
    return Tensor.of(np.array(values, np.float32))


SOUND: dict[str, Tensor | None] = {
    "prompt_token_ids": Tensor.of_int64(PROMPT),
    "prompt_logprobs": floats(-2.0, -np.inf),
    "prompt_ranks": Tensor.of_int64([3, 9]),
    "prompt_top_token_ids": Tensor.of(np.array([[A], [B]], np.int64)),
    "prompt_top_logprobs": floats([-0.25], [-0.5]),
}


def start(**fields: Any) -> list[Event]:
    message = Start(
        request_id="r",
        attempt=0,
        gateway_id="gateway-1",
        stopping=Stopping(),
        usage=Usage(),
        timings=Tensor.of_text(json.dumps({"images": []})),
        **SOUND | fields,
    )
    return received("llm-1", "llm", message)


def candidate(token_id: int, token: str, logprob: float) -> dict[str, Any]:
    data = {"token": token, "bytes": list(token.encode())}
    return data | {"token_id": token_id, "logprob": logprob}


def test_the_first_delta_has_an_entry_for_each_token_of_the_prompt() -> None:
    detokenizer = Detokenizer("gateway-1")
    detokenizer.play(start(), tokens(0, [A]), tokens(1, [B], finish_reason="stop"))
    first, second = detokenizer.deltas
    assert first.prompt_logprobs is not None and second.prompt_logprobs is None
    top = [[candidate(A, "a", -0.25)], [candidate(B, "b", -0.5)]]
    assert json.loads(first.prompt_logprobs.bytes()) == [
        None,
        candidate(B, "b", -2.0) | {"rank": 3, "top_logprobs": top[0]},
        candidate(OUTSIDE, "", -9999.0) | {"rank": 9, "top_logprobs": top[1]},
    ]


def test_an_answer_of_one_token_has_them_too() -> None:
    detokenizer = Detokenizer("gateway-1")
    detokenizer.play(start(), tokens(0, [A], finish_reason="length"))
    [delta] = detokenizer.deltas
    assert delta.finish_reason and delta.prompt_logprobs is not None


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_token_ids": None},
        {"prompt_token_ids": Tensor.of_int64([])},
        {"prompt_token_ids": Tensor.of_int64([A, B])},
        {"prompt_logprobs": None},
        {"prompt_logprobs": floats(np.nan, 0.0)},
        {"prompt_ranks": floats(1.0, 2.0)},
        {"prompt_top_token_ids": Tensor.of(np.array([[A], [VOCABULARY.size]], np.int64))},
        {"prompt_top_logprobs": floats(-0.25, -0.5)},
    ],
)
def test_malformed_ones_fail_their_answer_alone(fields: dict[str, Tensor | None]) -> None:
    detokenizer = Detokenizer("gateway-1")
    detokenizer.play(start(**fields), tokens(0, [A]))
    [failed] = detokenizer.member.links.of(Failed)
    assert failed.stage == "detokenizer" and not detokenizer.answers


def test_more_than_can_be_written_in_time_are_refused() -> None:
    count = MAX_PROMPT_LOGPROBS // 2 + 1
    none = np.zeros(count - 1, np.int64)
    many = {
        "prompt_token_ids": Tensor.of(np.zeros(count, np.int64)),
        "prompt_logprobs": Tensor.of(none.astype(np.float32)),
        "prompt_ranks": Tensor.of(none),
        "prompt_top_token_ids": Tensor.of(none[:, None]),
        "prompt_top_logprobs": Tensor.of(none[:, None].astype(np.float32)),
    }
    detokenizer = Detokenizer("gateway-1")
    detokenizer.play(start(**many))
    [failed] = detokenizer.member.links.of(Failed)
    assert "more than" in failed.message
