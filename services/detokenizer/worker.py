"""The detokenizer's work loop: token ids of answers in, their text out.

It sends each answer's deltas and its one end to the answer's gateway. It reports stop strings to
the language group.
"""

import json
import math
import time
from dataclasses import dataclass, field
from typing import Any, assert_never

import numpy as np

from common.boxes import boxes_in, write_boxes
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
    Stopping,
    Tokens,
    Usage,
    request_ids,
)
from common.progress import UnitTimes
from common.timings import Timings, read_timings, write_timings
from common.tool_calls import CLOSE, OPEN
from common.tracing import ATTEMPT, NO_SPAN, Span
from common.vocabulary import Vocabulary
from common.wire import Tensor
from services.detokenizer.incremental import IncrementalDecoder, logprob_entry
from services.detokenizer.metrics import DetokenizerMetrics
from services.detokenizer.prompt_logprobs import objection_to_prompt, prompt_entries
from services.detokenizer.tool_calls import Parsed, ToolCallParser

FINISH_REASONS = ("", "stop", "length", "repetition")
EXPIRY_SECONDS = 1.0
"""How often deadlines are checked."""
MAX_TOP_LOGPROBS = 20
MAX_ANSWERS_OF_A_GROUP = 4096
"""Answers in progress of one language group. Its gateways admit far fewer at once."""


@dataclass(slots=True)
class Answer:
    """An answer in progress."""

    llm_id: str
    gateway_id: str
    usage: Usage
    """Token counts of the prompt."""
    timings: Timings
    decoder: IncrementalDecoder
    deadline: float
    num_tokens: int
    """The number of tokens so far, of all attempts."""
    texts: list[str]
    """The pieces of the text so far, of all attempts; kept if the answer may hold boxes."""
    prompt_logprobs: Tensor | None = None
    """Those of the first Delta, until that is sent."""
    hidden_ids: frozenset[int] = frozenset()
    """The tokens whose text does not belong to the answer that they end."""
    began: float = field(default_factory=time.monotonic)
    span: Span = NO_SPAN
    calls: ToolCallParser | None = None
    """Takes the tool calls out of the text; None if they stay in it."""
    is_new: bool = True
    """Whether no token has come yet. The first piece has the timings of the stages before it."""

    @property
    def has_calls(self) -> bool:
        """Whether a whole tool call has come."""
        return self.calls is not None and self.calls.num_complete > 0

    def parse(self, text: str, is_end: bool) -> Parsed:
        """Return what new text makes certain of the text without calls, and of the calls."""
        if self.calls is None:
            return Parsed(text)
        parsed = self.calls.push(text)
        if is_end:
            parsed.add_text(self.calls.finish())
        return parsed


class Worker:
    """Decodes the answers that language groups generate."""

    def __init__(
        self,
        member: Member[DetokenizerInbound],
        vocabulary: Vocabulary,
        vocab_size: int,
        max_model_len: int,
        reads_boxes: bool = False,
        metrics: DetokenizerMetrics | None = None,
    ) -> None:
        """`vocab_size` is the number of the model's logits, which may exceed that of its tokens.
        No answer is longer than `max_model_len` tokens. `reads_boxes` says whether answers may hold
        boxes."""
        self._member = member
        self._vocabulary = vocabulary
        self._tool_vocabulary = vocabulary.with_markup((OPEN, CLOSE))
        self._vocab_size = vocab_size
        self._ending_ids = vocabulary.special_ids - vocabulary.markup_ids
        self._max_model_len = max_model_len
        self._reads_boxes = reads_boxes
        self._metrics = metrics or DetokenizerMetrics()
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
        next_expiry = 0.0
        while (events := self._wait_for_events()) is not None:
            for event in events:
                self._handle_alone(event)
            if (now := time.monotonic()) >= next_expiry:
                self._drop_expired(now)
                next_expiry = now + EXPIRY_SECONDS

    def _wait_for_events(self) -> list[Event[DetokenizerInbound]] | None:
        timeout = EXPIRY_SECONDS if self._answers else None
        return self._member.take_events(wait=True, timeout=timeout)

    def _drop_expired(self, now: float) -> None:
        """Drop the answers past their deadlines, which their gateways have ended."""
        for key in [key for key, answer in self._answers.items() if now > answer.deadline]:
            self._log.warning("an answer expired", request_id=key[0])
            del self._answers[key]

    def _handle_alone(self, event: Event[DetokenizerInbound]) -> None:
        """Handle an event so that whatever is wrong with it fails its own answer alone."""
        try:
            self._handle(event)
        except Exception:  # noqa: BLE001 - one message must not end the others
            self._log.exception("a message could not be handled")
            if isinstance(event, Received) and isinstance(event.message, Tokens):
                self._fail(event.message.key, "the tokens could not be read: see the log")

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
        for key, answer in [(k, a) for k, a in answers if peer_id in (a.llm_id, a.gateway_id)]:
            del self._answers[key]
            answer.span.end(error=f"{role} was lost: {reason}")
            if role == "llm":
                text = f"the detokenizer lost the language group: {reason}"
                ids = request_ids(key)
                failed = Failed(**ids, code="Unavailable", message=text, stage="llm")
                self._member.links.send(answer.gateway_id, failed)

    def _handle_message(self, peer_id: str, message: DetokenizerInbound) -> None:
        match message:
            case Start():
                self._begin(peer_id, message)
            case Tokens(key=key):
                if self._owns(peer_id, key):
                    began = time.perf_counter()
                    self._extend(key, message)
                    self._metrics.busy_seconds += time.perf_counter() - began
            case Failed(key=key):
                if self._owns(peer_id, key):
                    answer = self._answers.pop(key)
                    answer.span.end(error=message.code)
                    self._member.links.send(answer.gateway_id, message)
            case Abort(key=key):
                if self._owns(peer_id, key):
                    self._answers.pop(key).span.end()
            case Released():
                self._unreleased.discard(peer_id)
            case _:
                assert_never(message)

    def _owns(self, llm_id: str, key: RequestKey) -> bool:
        """Whether this language group brought the answer."""
        answer = self._answers.get(key)
        return answer is not None and answer.llm_id == llm_id

    def _begin(self, llm_id: str, start: Start) -> None:
        if start.key in self._answers:
            self._log.warning("ignored a second start", peer=llm_id, request_id=start.request_id)
            return
        if reason := self._objection_to(llm_id, start):
            self._refuse(llm_id, start.gateway_id, start.key, reason)
            return
        stopping = start.stopping
        vocabulary = self._tool_vocabulary if start.reads_tool_calls else self._vocabulary
        decoder = IncrementalDecoder(
            vocabulary,
            stopping.stop,
            stopping.skip_special_tokens,
            stopping.min_tokens,
            stopping.include_stop,
        )
        calls = ToolCallParser(start.request_id) if start.reads_tool_calls else None
        resumed = start.output_token_ids.numpy().tolist() if start.output_token_ids else []
        with self._member.progress.unit(self._resume_times, len(resumed)):
            text = decoder.push(resumed)  # which an earlier attempt has delivered
            if calls:
                calls.push(text)
        self._answers[start.key] = Answer(
            llm_id=llm_id,
            gateway_id=start.gateway_id,
            usage=start.usage,
            timings=read_timings(start.timings),
            decoder=decoder,
            deadline=time.monotonic() + start.timeout,
            num_tokens=len(resumed),
            texts=[text] if self._reads_boxes else [],
            calls=calls,
            prompt_logprobs=prompt_entries(self._vocabulary, start),
            hidden_ids=self._hidden_ids(stopping),
            span=self._member.tracing.begin(
                "detokenizer", start.traceparent, None, {ATTEMPT: start.attempt}, "consumer"
            ),
        )
        self._log.debug("answer begins", request_id=start.request_id)

    def _hidden_ids(self, stopping: Stopping) -> frozenset[int]:
        """Return the tokens that end an answer without being part of its text.

        Besides the stop tokens these are special tokens, one of which is the end token. Markup is
        part of the text also where a grammar ends with it.
        """
        if stopping.include_stop:
            return frozenset()
        return self._ending_ids.union(stopping.stop_token_ids)

    def _objection_to(self, llm_id: str, start: Start) -> str:
        """Return why an answer cannot begin; empty if it can."""
        if start.gateway_id not in self._gateways:
            return f"no gateway {start.gateway_id!r} is connected"
        if (
            len(self._answers) >= MAX_ANSWERS_OF_A_GROUP
            and [a.llm_id for a in self._answers.values()].count(llm_id) >= MAX_ANSWERS_OF_A_GROUP
        ):
            return f"{MAX_ANSWERS_OF_A_GROUP} answers of the language group are in progress"
        try:
            read_timings(start.timings)
        except ValueError as e:
            return str(e)
        if reason := objection_to_prompt(start, self._vocab_size):
            return reason
        if start.output_token_ids is None:
            return ""
        return self._objection_to_ids("output_token_ids", start.output_token_ids, 0)

    def _objection_to_ids(self, name: str, ids: Tensor, num_before: int) -> str:
        """Return why these are not token ids that follow `num_before` others; empty if they are."""
        if ids.dtype != "int64" or len(ids.shape) != 1:
            return f"{name} is {ids}, int64 [n] is wanted"
        if num_before + ids.shape[0] > self._max_model_len:
            return f"the answer is longer than the context of {self._max_model_len} tokens"
        values = ids.numpy()
        if values.size and not 0 <= values.min() <= values.max() < self._vocab_size:
            return f"{name} has a value outside [0, {self._vocab_size})"
        return ""

    def _objection_to_tokens(self, answer: Answer, tokens: Tokens) -> str:
        """Return why these tokens do not continue the answer; empty if they do."""
        if tokens.offset != answer.num_tokens:
            return f"token {tokens.offset} came instead of token {answer.num_tokens}"
        if tokens.finish_reason not in FINISH_REASONS:
            return f"there is no finish reason {tokens.finish_reason!r}"
        if reason := self._objection_to_ids("token_ids", tokens.token_ids, answer.num_tokens):
            return reason
        return self._objection_to_logprobs(tokens)

    def _objection_to_logprobs(self, tokens: Tokens) -> str:
        given = (tokens.logprobs, tokens.top_token_ids, tokens.top_logprobs)
        if given == (None, None, None):
            return ""
        count = tokens.token_ids.shape[0]
        num_top = tokens.top_token_ids.shape[-1:] if tokens.top_token_ids else ()
        wanted = (
            ("float32", (count,)),
            ("int64", (count, *num_top)),
            ("float32", (count, *num_top)),
        )
        for tensor, (dtype, shape) in zip(given, wanted, strict=True):
            if tensor is None or (tensor.dtype, tensor.shape) != (dtype, shape):
                return f"log-probabilities are {given}, those of {count} tokens are wanted"
            if dtype == "float32" and np.isnan(tensor.numpy()).any():
                return "a log-probability is not a number"
        assert tokens.top_token_ids is not None
        flat = Tensor("int64", (math.prod(tokens.top_token_ids.shape),), tokens.top_token_ids.data)
        if num_top and num_top[0] > MAX_TOP_LOGPROBS:
            return f"{num_top[0]} alternatives of a token, at most {MAX_TOP_LOGPROBS} are possible"
        return self._objection_to_ids("top_token_ids", flat, -flat.shape[0])

    def _fail(self, key: RequestKey, reason: str) -> None:
        """End an answer in progress that cannot go on."""
        if answer := self._answers.pop(key, None):
            answer.span.end(error=reason)
            self._refuse(answer.llm_id, answer.gateway_id, key, reason)

    def _refuse(self, llm_id: str, gateway_id: str, key: RequestKey, reason: str) -> None:
        """Report an answer that cannot be to its gateway, and have its group free it."""
        ids = request_ids(key)
        self._log.error("answer failed", request_id=key[0], peer=llm_id, reason=reason)
        if gateway_id in self._gateways:
            failed = Failed(**ids, code="Internal", message=reason, stage="detokenizer")
            self._member.links.send(gateway_id, failed)
        self._member.links.send(llm_id, StopFound(**ids))

    def _extend(self, key: RequestKey, tokens: Tokens) -> None:
        """Send the text that new tokens add to an answer, and its end if they end it."""
        answer = self._answers[key]
        if reason := self._objection_to_tokens(answer, tokens):
            self._fail(key, reason)
            return
        answer.num_tokens += tokens.token_ids.shape[0]
        self._metrics.num_tokens += tokens.token_ids.shape[0]
        decoder = answer.decoder
        ids = tokens.token_ids.numpy().tolist()
        finish_reason = tokens.finish_reason
        ends_hidden = finish_reason == "stop" and ids and ids[-1] in answer.hidden_ids
        text = decoder.push(ids[:-1] if ends_hidden else ids)
        if decoder.stopped:
            ids = ids[: max(0, decoder.num_tokens - tokens.offset)]
            finish_reason = "stop"
        if finish_reason:
            text += decoder.finish()
            del self._answers[key]
        if self._reads_boxes:
            answer.texts.append(text)
        parsed = answer.parse(text, is_end=bool(finish_reason))
        if finish_reason == "stop" and answer.has_calls:
            finish_reason = "tool_calls"
        if decoder.stopped and not tokens.finish_reason:
            self._member.links.send(answer.llm_id, StopFound(**tokens.ids))
        more: dict[str, Any] = {}
        if finish_reason:
            more = self._end(answer, tokens.offset + len(ids), finish_reason)
        elif answer.is_new:
            timings = Tensor.of_bytes(write_timings(answer.timings))
            more = {"timings": timings, "usage": answer.usage}
        if answer.prompt_logprobs:
            more["prompt_logprobs"] = answer.prompt_logprobs
            answer.prompt_logprobs = None
        answer.is_new = False
        delta = Delta(
            **tokens.ids,
            offset=tokens.offset,
            token_ids=Tensor.of(np.array(ids, np.int64)),
            text=Tensor.of_text(parsed.text),
            tool_calls=Tensor.of_text(json.dumps(parsed.parts)) if parsed.parts else None,
            logprobs=self._logprobs(tokens, len(ids)),
            **more,
        )
        self._member.links.send(answer.gateway_id, delta)

    def _end(self, answer: Answer, completion_tokens: int, finish_reason: str) -> dict[str, Any]:
        """Return the fields of a Delta that ends an answer."""
        prompt = answer.usage
        usage = Usage(
            prompt_tokens=prompt.prompt_tokens,
            image_tokens=prompt.image_tokens,
            completion_tokens=completion_tokens,
            cached_tokens=prompt.cached_tokens,
        )
        answer.span.end({"twinlens.finish_reason": finish_reason})
        answer.timings["decode_seconds"] = time.monotonic() - answer.began
        return {
            "finish_reason": finish_reason,
            "usage": usage,
            "timings": Tensor.of_bytes(write_timings(answer.timings)),
            "boxes": write_boxes(boxes_in("".join(answer.texts))) if self._reads_boxes else None,
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
        entries = [
            logprob_entry(self._vocabulary, token_id, logprob, zip(top_ids, top, strict=True))
            for token_id, logprob, top_ids, top in rows
        ]
        return Tensor.of_text(json.dumps(entries))
