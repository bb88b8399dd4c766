"""The detokenizer's work loop: token ids of answers in, their text out.

It sends each answer's deltas and its one end to the answer's gateway. It reports stop strings to
the language group.
"""

import json
import time
from dataclasses import dataclass, field
from typing import Any, assert_never

import numpy as np

from common.events import PeerDown, PeerUp, Received
from common.logs import get_logger
from common.member import Drain, Event, Member
from common.messages import (
    Abort,
    Delta,
    DetokenizerInbound,
    Failed,
    Released,
    RequestKey,
    Start,
    StopFound,
    Tokens,
    Usage,
    request_ids,
)
from common.progress import UnitTimes
from common.vocabulary import Vocabulary
from common.wire import Tensor
from services.detokenizer.incremental import IncrementalDecoder, logprob_entry


@dataclass(slots=True)
class Answer:
    """An answer in progress."""

    start: Start
    llm_id: str
    decoder: IncrementalDecoder
    began: float = field(default_factory=time.monotonic)


class Worker:
    """Decodes the answers that language groups generate."""

    def __init__(self, member: Member[DetokenizerInbound], vocabulary: Vocabulary) -> None:
        self._member = member
        self._vocabulary = vocabulary
        self._answers: dict[RequestKey, Answer] = {}
        self._gateways: set[str] = set()
        self._unreleased: set[str] = set()
        """The gateways that may still have answers coming here, while this member drains."""
        self._draining = False
        self._resume_times = UnitTimes()
        self._log = get_logger()
        member.track_load(self.load)

    def load(self) -> tuple[int, int]:
        """Return (answers in progress, gateways that keep a draining member alive)."""
        return len(self._answers), len(self._unreleased)

    def run(self) -> None:
        """Handle events until the process stops."""
        for event in self._member.events():
            self._handle(event)

    def _handle(self, event: Event[DetokenizerInbound]) -> None:
        match event:
            case PeerUp(peer_id=peer_id, role="gateway"):
                self._gateways.add(peer_id)
                self._unreleased |= {peer_id} if self._draining else set()
            case Drain():
                self._draining = True
                self._unreleased |= self._gateways
            case Received(peer_id=peer_id, message=message):
                self._handle_message(peer_id, message)
            case PeerDown(peer_id=peer_id, role=role, reason=reason):
                self._log.info("peer gone", peer=peer_id, reason=reason)
                self._on_peer_down(peer_id, role, reason)

    def _on_peer_down(self, peer_id: str, role: str, reason: str) -> None:
        """Drop the answers of a dead peer.

        If it is a language group, report this to their gateways. A gateway may not notice it: its
        own connection to the group may stand.
        """
        self._gateways.discard(peer_id)
        self._unreleased.discard(peer_id)
        answers = self._answers.items()
        for key, answer in [
            (k, a) for k, a in answers if peer_id in (a.llm_id, a.start.gateway_id)
        ]:
            del self._answers[key]
            if role == "llm":
                text = f"the detokenizer lost the language group: {reason}"
                ids = request_ids(key)
                failed = Failed(**ids, code="Unavailable", message=text, stage="llm")
                self._member.links.send(answer.start.gateway_id, failed)

    def _handle_message(self, peer_id: str, message: DetokenizerInbound) -> None:
        match message:
            case Start():
                self._begin(peer_id, message)
            case Tokens(key=key):
                if key in self._answers:
                    self._extend(key, message)
            case Failed(key=key):
                if answer := self._answers.pop(key, None):
                    self._member.links.send(answer.start.gateway_id, message)
            case Abort(key=key):
                self._answers.pop(key, None)
            case Released():
                self._unreleased.discard(peer_id)
            case _:
                assert_never(message)

    def _begin(self, llm_id: str, start: Start) -> None:
        stopping = start.stopping
        decoder = IncrementalDecoder(
            self._vocabulary, stopping.stop, stopping.skip_special_tokens, stopping.min_tokens
        )
        if start.output_token_ids:
            # An earlier attempt delivered the text of these tokens.
            token_ids = start.output_token_ids.numpy().tolist()
            with self._member.progress.unit(self._resume_times, len(token_ids)):
                decoder.push(token_ids)
        self._answers[start.key] = Answer(start, llm_id, decoder)
        self._log.debug("answer begins", request_id=start.request_id)

    def _extend(self, key: RequestKey, tokens: Tokens) -> None:
        """Send the text that new tokens add to an answer, and its end if they end it."""
        answer = self._answers[key]
        decoder = answer.decoder
        ids = tokens.token_ids.numpy().tolist()
        text = decoder.push(ids)
        finish_reason = tokens.finish_reason
        if decoder.stopped:
            ids = ids[: decoder.num_tokens - tokens.offset]
            finish_reason = "stop"
        if finish_reason:
            text += decoder.finish()
            del self._answers[key]
        if decoder.stopped and not tokens.finish_reason:
            self._member.links.send(answer.llm_id, StopFound(**tokens.ids))
        end = self._end(answer, tokens.offset + len(ids), finish_reason) if finish_reason else {}
        delta = Delta(
            **tokens.ids,
            offset=tokens.offset,
            token_ids=Tensor.of(np.array(ids, np.int64)),
            text=Tensor.of_text(text),
            logprobs=self._logprobs(tokens, len(ids)),
            **end,
        )
        self._member.links.send(answer.start.gateway_id, delta)

    def _end(self, answer: Answer, completion_tokens: int, finish_reason: str) -> dict[str, Any]:
        """Return the fields of a Delta that ends an answer."""
        prompt = answer.start.usage
        usage = Usage(
            prompt_tokens=prompt.prompt_tokens,
            image_tokens=prompt.image_tokens,
            completion_tokens=completion_tokens,
            cached_tokens=prompt.cached_tokens,
        )
        timings = json.loads(answer.start.timings.bytes()) | {
            "decode_seconds": time.monotonic() - answer.began
        }
        return {
            "finish_reason": finish_reason,
            "usage": usage,
            "timings": Tensor.of_text(json.dumps(timings)),
        }

    def _logprobs(self, tokens: Tokens, count: int) -> Tensor | None:
        """Return the entries of the first `count` tokens as JSON, if they were asked for."""
        if tokens.logprobs is None:
            return None
        assert tokens.top_token_ids is not None and tokens.top_logprobs is not None
        rows = zip(
            tokens.token_ids.numpy().tolist()[:count],
            tokens.logprobs.numpy().tolist(),
            tokens.top_token_ids.numpy().tolist(),
            tokens.top_logprobs.numpy().tolist(),
            strict=False,
        )
        return Tensor.of_text(json.dumps([self._entry(*row) for row in rows]))

    def _entry(
        self, token_id: int, logprob: float, top_ids: list[int], top_logprobs: list[float]
    ) -> dict[str, Any]:
        """Return OpenAI's entry with the token ids, which gRPC clients get."""
        top = zip(top_ids, top_logprobs, strict=True)
        entry = logprob_entry(self._vocabulary, token_id, logprob, top)
        entry["token_id"] = token_id
        for candidate, candidate_id in zip(entry["top_logprobs"], top_ids, strict=True):
            candidate["token_id"] = candidate_id
        return entry
