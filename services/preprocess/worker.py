"""The preprocess work loop: it prepares requests in steps and serves items in flight between."""

import json
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np

from common.apart import Turn
from common.errors import Internal, InvalidRequest, ServingError, Unavailable
from common.events import PeerDown, PeerDraining, PeerUp, Received
from common.logs import get_logger
from common.member import Event, Member
from common.messages import (
    Abort,
    Alone,
    Cleared,
    Failed,
    LlmLoad,
    Noted,
    Peer,
    PreprocessInbound,
    Prompt,
    RequestKey,
    Routed,
    Submit,
    VisionLoad,
    request_ids,
)
from common.progress import UnitTimes
from common.wire import Tensor
from services.preprocess.dispatcher import Dispatcher
from services.preprocess.grammars import Grammars
from services.preprocess.in_flight import Handover, PendingItem, Preparation, SentPrompt
from services.preprocess.llm_groups import LlmGroups
from services.preprocess.metrics import PreprocessMetrics
from services.preprocess.prepared import ExpandedPrompt, PreparedItem
from services.preprocess.preprocessor import Preprocessor
from services.preprocess.sampling_defaults import resolve_sampling, resolve_stopping
from services.preprocess.vision_pool import VisionPool

CHECK_SECONDS = 0.5
UNCONFIRMED_SECONDS = 5.0
"""How long a prompt without items counts as unconfirmed: if the connection to its language group
breaks within this time (the lease and a margin), it may not have arrived."""
MAX_HELD_BYTES = 512 * 2**20
"""The bytes of decoded items that may wait to be encoded. Beyond it no other item is decoded."""
MAX_ERROR_CHARS = 2000


class Worker:
    """Owns requests until their items are in the language group's hands."""

    def __init__(
        self,
        member: Member[PreprocessInbound],
        preprocessor: Preprocessor,
        pool: VisionPool,
        metrics: PreprocessMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._member = member
        self._preprocessor = preprocessor
        self._metrics = metrics
        self._clock = clock
        self._preparations: OrderedDict[RequestKey, Preparation] = OrderedDict()
        self._turn = Turn(clock)
        self._pool = pool
        self._dispatcher = Dispatcher(member.links, pool, self._fail, metrics, clock)
        self._groups = LlmGroups(clock)
        self._grammars = Grammars(preprocessor.vocabulary)
        # The size of a file says little about the size of its picture.
        self._times = UnitTimes(least_seconds=2.5)
        self._unconfirmed: deque[SentPrompt] = deque()
        self._next_check = 0.0
        self._missing: list[str] | None = None
        self._log = get_logger()
        member.track_load(self.load)

    def load(self) -> tuple[int, int]:
        """Return (requests with items in flight, requests in preparation)."""
        return len(self._dispatcher.handovers), len(self._preparations)

    def run(self) -> None:
        """Prepare one step of the oldest request, then handle what arrived meanwhile.

        So a grant never waits for a whole request of many images.
        """
        while (events := self._wait_for_events()) is not None:
            for event in events:
                self._handle(event)
            self._check_deadlines()
            self._dispatcher.offer_waiting()
            self._member.expected_delay = self._pool.queue_seconds
            if found := self._next():
                self._advance(*found)
            self._announce_turn()

    def _wait_for_events(self) -> list[Event[PreprocessInbound]] | None:
        timeout = CHECK_SECONDS if self._preparations or self._dispatcher.handovers else None
        return self._member.take_events(wait=self._next() is None, timeout=timeout)

    def _next(self) -> tuple[RequestKey, Preparation] | None:
        """Return the oldest preparation that can go on, or the one that has the turn."""
        holder = self._turn.holder
        for key, preparation in self._preparations.items():
            if holder is not None and (key != holder or not self._turn.is_noted):
                continue
            if self._can_advance(preparation):
                return key, preparation
        return None

    def _can_advance(self, preparation: Preparation) -> bool:
        if preparation.is_prepared:
            avoided = preparation.submit.avoid
            return self._groups.has_other(avoided) or self._groups.missing_too_long()
        return not preparation.needs_item or self._dispatcher.num_bytes < MAX_HELD_BYTES

    def _handle(self, event: Event[PreprocessInbound]) -> None:
        match event:
            case Received(peer_id=peer_id, message=message):
                self._handle_message(peer_id, message)
            case PeerUp(peer_id=peer_id, role="llm", address=address):
                self._groups.add(Peer(peer_id, address))
            case PeerDraining(peer_id=peer_id, role=role):
                (self._pool if role == "vision" else self._groups).drain(peer_id)
            case PeerDown(peer_id=peer_id, role=role, reason=reason):
                self._log.info("peer gone", peer=peer_id, reason=reason)
                self._on_peer_down(peer_id, role, reason)
        if not isinstance(event, Received) or isinstance(event.message, VisionLoad):
            self._report_missing_roles()

    def _handle_message(self, peer_id: str, message: PreprocessInbound) -> None:
        match message:
            case Submit(key=key):
                self._preparations[key] = Preparation(message, peer_id, self._clock())
            case Abort(key=key):
                self._drop(key)
                self._turn.release(key, peer_id)
            case Noted(key=key):
                self._turn.note(key, peer_id)
            case Cleared(key=key):
                self._turn.release(key, peer_id)
            case LlmLoad():
                self._groups.update_load(peer_id, message)
            case _:
                self._dispatcher.handle_message(peer_id, message)

    def _on_peer_down(self, peer_id: str, role: str, reason: str) -> None:
        match role:
            case "vision":
                self._dispatcher.on_replica_down(peer_id, reason)
            case "gateway":
                self._drop_requests_of(peer_id)
            case "llm":
                self._groups.remove(peer_id)
                self._report_lost_requests(peer_id, reason)

    def _report_lost_requests(self, llm_id: str, reason: str) -> None:
        """Report the requests that a dead language group held to their gateways.

        A gateway may not notice the death: its own connection to the group may stand.
        """
        handovers = self._dispatcher.handovers.items()
        for key, handover in [(key, h) for key, h in handovers if h.llm.id == llm_id]:
            self._drop(key)
            self._report_lost(key, handover.gateway_id, reason)
        for sent in [sent for sent in self._unconfirmed if sent.llm_id == llm_id]:
            self._unconfirmed.remove(sent)
            self._report_lost(sent.key, sent.gateway_id, reason)

    def _report_lost(self, key: RequestKey, gateway_id: str, reason: str) -> None:
        error = Unavailable(f"preprocess lost the language group: {reason}", stage="llm")
        self._fail(key, gateway_id, error)

    def _drop_requests_of(self, gateway_id: str) -> None:
        owners = {key: p.gateway_id for key, p in self._preparations.items()}
        owners |= {key: h.gateway_id for key, h in self._dispatcher.handovers.items()}
        for key, owner in owners.items():
            if owner == gateway_id:
                self._drop(key)
        self._turn.release_all_of(gateway_id)

    def _drop(self, key: RequestKey) -> None:
        self._preparations.pop(key, None)
        self._dispatcher.drop(key)

    def _report_missing_roles(self) -> None:
        """Be ready while there is a member of each role that the family's requests pass through."""
        counts = {"vision": self._pool.num_replicas, "llm": len(self._groups)}
        needed = self._preprocessor.checkpoint.family.needed_roles
        missing = [role for role in needed if not counts[role]]
        if missing != self._missing:
            self._missing = missing
            self._member.set_missing_roles(missing)

    def _check_deadlines(self) -> None:
        """Drop what is past its time, twice a second."""
        if (now := self._clock()) < self._next_check:
            return
        self._next_check = now + CHECK_SECONDS
        self._dispatcher.end_hopeless()
        while self._unconfirmed and now > self._unconfirmed[0].when + UNCONFIRMED_SECONDS:
            self._unconfirmed.popleft()
        # The gateway has ended these requests by now.
        for key in [key for key, p in self._preparations.items() if now > p.deadline]:
            self._drop(key)
            self._turn.release_expired(key)

    # Preparing

    def _announce_turn(self) -> None:
        """Report a request that will be the only one in preparation."""
        if announcement := self._turn.announcement():
            gateway_id, key = announcement
            self._member.links.send(gateway_id, Alone(**request_ids(key)))

    def _advance(self, key: RequestKey, preparation: Preparation) -> None:
        """Tokenize, or prepare the next item, or hand the request over.

        A request that is apart first takes its turn.
        """
        if preparation.submit.apart and self._turn.holder is None:
            self._turn.take(key, preparation.gateway_id)
            return
        try:
            with self._member.progress.unit(self._times, 1):
                self._take_step(key, preparation)
        except ServingError as e:
            self._preparations.pop(key, None)
            self._fail(key, preparation.gateway_id, e)
        except Exception:  # noqa: BLE001 - the outermost loop: one request must not end the others
            self._log.exception("request failed", request_id=key[0])
            self._preparations.pop(key, None)
            error = Internal("the request could not be prepared: see the preprocess log")
            self._fail(key, preparation.gateway_id, error)

    def _take_step(self, key: RequestKey, preparation: Preparation) -> None:
        if preparation.token_ids is None:
            self._tokenize(preparation)
        elif preparation.needs_item:
            self._prepare_item(preparation)
        else:
            del self._preparations[key]
            self._hand_over(key, preparation)

    def _tokenize(self, preparation: Preparation) -> None:
        submit = preparation.submit
        preparation.token_ids = self._preprocessor.tokenize(submit.prompt_kind, prompt_of(submit))
        if submit.guide_kind:
            guide = submit.guide.text() if submit.guide else ""
            grammar = self._grammars.grammar(submit.guide_kind, guide)
            preparation.grammar = Tensor.of_text(grammar)

    def _prepare_item(self, preparation: Preparation) -> None:
        began = time.monotonic()
        index = len(preparation.items)
        item = preparation.submit.items[index]
        try:
            prepared = self._preprocessor.prepare_item(
                item.kind, item.data.data, self._pool.buckets
            )
        except InvalidRequest as e:
            raise type(e)(f"{item.kind} {index}: {e.message}", item=index) from e
        preparation.items.append(prepared)
        preparation.item_seconds.append(time.monotonic() - began)
        self._metrics.image_seconds.observe(preparation.item_seconds[-1])

    def _hand_over(self, key: RequestKey, preparation: Preparation) -> None:
        """Send the prompt to a language group. Its items follow once the group has room."""
        submit = preparation.submit
        items = preparation.items
        assert preparation.token_ids is not None
        expanded = self._preprocessor.expand(preparation.token_ids, items)
        prompt = self._prompt_of(preparation, expanded)
        llm = self._groups.choose(expanded, [item.mm_hash for item in items], submit.avoid)
        if llm is None:
            error = "no language group is connected: try again in a moment"
            raise Unavailable(error, stage="llm")
        ids = Tensor.of(expanded.token_ids) if submit.return_prompt_token_ids else None
        routed = Routed(**request_ids(key), llm=llm, prompt_token_ids=ids)
        self._member.links.send(preparation.gateway_id, routed)
        self._member.links.send(llm.id, prompt)
        if items:
            pending = {i: PendingItem((*key, i), item) for i, item in enumerate(items)}
            handover = Handover(preparation.gateway_id, llm, preparation.deadline, pending)
            self._dispatcher.begin(key, handover)
        else:
            sent = SentPrompt(self._clock(), key, preparation.gateway_id, llm.id)
            self._unconfirmed.append(sent)
        self._log.debug(
            "handed over",
            request_id=submit.request_id,
            num_tokens=expanded.num_tokens,
            images=len(items),
        )

    def _prompt_of(self, preparation: Preparation, expanded: ExpandedPrompt) -> Prompt:
        submit = preparation.submit
        max_model_len = self._preprocessor.max_model_len
        stopping = resolve_stopping(submit.stopping, expanded.num_tokens, max_model_len)
        defaults = self._preprocessor.checkpoint.generation_config
        return Prompt(
            **submit.ids,
            gateway_id=preparation.gateway_id,
            token_ids=Tensor.of(expanded.token_ids),
            positions=Tensor.of(expanded.positions),
            rope_delta=expanded.rope_delta,
            placeholders=Tensor.of(expanded.placeholders),
            mm_hashes=Tensor.of(hashes_of(preparation.items)),
            sampling=resolve_sampling(submit.sampling, defaults),
            stopping=stopping,
            detokenizer=submit.detokenizer,
            timeout=max(0.0, preparation.deadline - self._clock()),
            timings=timings_of(preparation, self._clock()),
            grammar=preparation.grammar,
            output_token_ids=submit.output_token_ids,
            cache_salt=expanded.cache_salt,
            rope_parameter=expanded.rope_parameter,
            whole=expanded.whole,
            apart=submit.apart_in_llm,
        )

    def _fail(self, key: RequestKey, gateway_id: str, error: ServingError) -> None:
        message = Failed(
            **request_ids(key),
            code=error.code,
            message=error.message[:MAX_ERROR_CHARS],
            stage=error.stage or "preprocess",
            item=error.item,
        )
        self._member.links.send(gateway_id, message)


def prompt_of(submit: Submit) -> Any:
    """Return the chat messages, or the token ids as int64 [n]."""
    if submit.prompt_kind == "token_ids":
        return submit.prompt.numpy()
    return json.loads(submit.prompt.bytes())


def hashes_of(items: list[PreparedItem]) -> np.ndarray:
    """uint8 [num_items, 32]."""
    hashes = [list(bytes.fromhex(item.mm_hash)) for item in items]
    return np.array(hashes, np.uint8).reshape(-1, 32)


def timings_of(preparation: Preparation, now: float) -> Tensor:
    """UTF-8 JSON of what preprocess took, for the request and for each item."""
    timings = {
        "preprocess_seconds": now - preparation.received,
        "images": [{"preprocess_seconds": seconds} for seconds in preparation.item_seconds],
    }
    return Tensor.of_text(json.dumps(timings))
