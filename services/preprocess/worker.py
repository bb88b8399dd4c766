"""The preprocess work loop: it prepares requests in steps and serves items in flight between."""

import json
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec
import numpy as np

from common.apart import Turn
from common.errors import Internal, InvalidRequest, ServingError, Unavailable, from_code, shorten
from common.events import PeerDown, PeerDraining, PeerUp, Received
from common.logs import get_logger
from common.member import Event, Member, Posted
from common.messages import (
    Abort,
    Adapters,
    Alone,
    Cleared,
    Converted,
    Failed,
    LlmLoad,
    Noted,
    Peer,
    PreprocessInbound,
    Prompt,
    RequestKey,
    RequestMessage,
    Routed,
    Submit,
    TokenRules,
    VisionLoad,
    request_ids,
)
from common.progress import UnitTimes
from common.tracing import ATTEMPT
from common.wire import Tensor
from services.preprocess.dispatcher import Dispatcher
from services.preprocess.in_flight import Handover, PendingItem, Preparation, SentPrompt
from services.preprocess.llm_groups import LlmGroups
from services.preprocess.metrics import PreprocessMetrics
from services.preprocess.prepared import ExpandedPrompt, PreparedItem
from services.preprocess.preprocessor import Preprocessor
from services.preprocess.priority import enqueue
from services.preprocess.sampling_defaults import resolve_sampling, resolve_stopping
from services.preprocess.sandbox.jobs import Prepared, PreparedFacts, ReadDone, Refused, Spelled
from services.preprocess.sandbox.pool import Finished, Task, Tasks
from services.preprocess.submit_checks import check_prompt_logprobs, check_submit, check_task
from services.preprocess.tasks import preparing, reading, ready_item, spelling
from services.preprocess.traces import record_items
from services.preprocess.vision_pool import VisionPool

CHECK_SECONDS = 0.5
UNCONFIRMED_SECONDS = 5.0
"""How long a prompt without items counts as unconfirmed: if the connection to its language group
breaks within this time (the lease and a margin), it may not have arrived."""
MAX_HELD_BYTES = 512 * 2**20
"""The bytes of decoded items that may wait to be encoded. Beyond it no other item is decoded."""
MAX_CONVERTED_BYTES = 15 * 2**20
"""The most bytes of token ids, names and text in a Converted, within the hop's own limit."""
MAX_ERROR_CHARS = 1900
LOOK_SECONDS = 0.1
"""How often the running tasks are looked at while others wait for a sandbox."""
SEE_LOG = "the request could not be prepared: see the preprocess log"


class Worker:
    """Owns requests until their items are in the language group's hands."""

    def __init__(
        self,
        member: Member[PreprocessInbound],
        preprocessor: Preprocessor,
        tasks: Tasks,
        pool: VisionPool,
        metrics: PreprocessMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._member = member
        self._preprocessor = preprocessor
        self._tasks = tasks
        self._metrics = metrics
        self._clock = clock
        self._preparations: OrderedDict[RequestKey, Preparation] = OrderedDict()
        self._turn = Turn(clock)
        self._prepared_bytes = 0
        """The bytes of the items of all preparations."""
        self._pool = pool
        self._dispatcher = Dispatcher(
            member.links,
            pool,
            self._fail,
            metrics,
            clock,
            name=member.id,
            has_tower="vision" in preprocessor.checkpoint.family.needed_roles,
            tracing=member.tracing,
        )
        self._groups = LlmGroups(clock)
        self._times = UnitTimes()
        self._unconfirmed: deque[SentPrompt] = deque()
        self._next_check = 0.0
        self._missing: list[str] | None = None
        self._log = get_logger()
        member.track_load(self.load)

    def load(self) -> tuple[int, int]:
        """Return (requests with items in flight, requests in preparation)."""
        return len(self._dispatcher.handovers), len(self._preparations)

    def run(self) -> None:
        """Handle what arrived, then take one step of the first request that can go on.

        The steps that may take long are tasks of sandboxes, which post their results.
        """
        while (events := self._wait_for_events()) is not None:
            for event in events:
                self._handle_safely(event)
            self._check_deadlines()
            self._tasks.look()
            self._dispatcher.offer_waiting()
            self._member.expected_delay = self._pool.queue_seconds
            if preparation := self._next():
                self._advance(preparation)
            self._announce_turn()

    def _wait_for_events(self) -> list[Event[PreprocessInbound]] | None:
        timeout = CHECK_SECONDS if self._preparations or self._dispatcher.handovers else None
        if self._tasks.num_waiting:
            timeout = LOOK_SECONDS
        return self._member.take_events(wait=self._next() is None, timeout=timeout)

    def _next(self) -> Preparation | None:
        """Return the first preparation that can go on, or only the one that has the turn.

        While the next one is apart and others are in sandboxes, none goes on.
        """
        preparations = list(self._preparations.values())
        if holder := self._turn.holder:
            preparations = [p for p in preparations if p.key == holder and self._turn.is_noted]
        found = next((p for p in preparations if self._can_advance(p)), None)
        if found and self._must_take_turn(found) and any(p.task for p in preparations):
            return None
        return found

    def _must_take_turn(self, preparation: Preparation) -> bool:
        return preparation.submit.apart and self._turn.holder is None

    def _can_advance(self, preparation: Preparation) -> bool:
        if preparation.task:
            return False
        if preparation.is_prepared:
            avoided = preparation.submit.avoid
            return self._groups.has_other(avoided) or self._groups.missing_too_long()
        return preparation.token_ids is None or self._has_room_for_items(preparation)

    def _has_room_for_items(self, preparation: Preparation) -> bool:
        """Whether the next items may be decoded.

        Those of the oldest request only wait for what was handed over: if every request waited for
        what others hold, none would go on.
        """
        handed_over = self._dispatcher.num_bytes
        if handed_over + self._prepared_bytes < MAX_HELD_BYTES:
            return True
        oldest = next((p for p in self._preparations.values() if p.submit.items), None)
        return preparation is oldest and handed_over < MAX_HELD_BYTES

    def _handle_safely(self, event: Event[PreprocessInbound]) -> None:
        try:
            self._handle(event)
        except Exception:  # noqa: BLE001 - the outermost loop: one message must not end the others
            self._log.exception("an event failed")
            if isinstance(event, Received) and isinstance(event.message, RequestMessage):
                self._fail_owned(event.message.key)

    def _fail_owned(self, key: RequestKey) -> None:
        """End a request at its gateway after a bug, if it is held here."""
        if gateway_id := self._owner_of(key):
            self._drop(key)
            self._fail(key, gateway_id, Internal(SEE_LOG))

    def _owner_of(self, key: RequestKey) -> str:
        """Return the id of the gateway that brought a request; empty if it is not held here."""
        held = self._preparations.get(key) or self._dispatcher.handovers.get(key)
        return held.gateway_id if held else ""

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
            case Posted(event=posted):
                if finished := self._tasks.handle(posted):
                    self._on_finished(finished)
        if not isinstance(event, Received) or isinstance(event.message, VisionLoad):
            self._report_missing_roles()

    def _handle_message(self, peer_id: str, message: PreprocessInbound) -> None:
        match message:
            case Submit():
                self._on_submit(peer_id, message)
            case Abort(key=key):
                if self._owner_of(key) == peer_id:
                    self._drop(key)
                self._turn.release(key, peer_id)
            case Noted(key=key):
                self._turn.note(key, peer_id)
            case Cleared(key=key):
                self._turn.release(key, peer_id)
            case LlmLoad():
                self._groups.update_load(peer_id, message)
            case Adapters():
                self._groups.update_adapters(peer_id, message)
            case _:
                self._dispatcher.handle_message(peer_id, message)

    def _on_submit(self, gateway_id: str, submit: Submit) -> None:
        key = submit.key
        if owner := self._owner_of(key):
            # Answering its own gateway would end the request that is in work.
            self._log.warning("a request came twice", request_id=key[0], gateway=gateway_id)
            if owner != gateway_id:
                error = InvalidRequest("another gateway uses this request id: choose another one")
                self._fail(key, gateway_id, error)
            return
        preparation = Preparation(submit, gateway_id, self._clock())
        preparation.span = self._member.tracing.begin(
            "preprocess", submit.traceparent, None, {ATTEMPT: submit.attempt}, "consumer"
        )
        enqueue(self._preparations, key, preparation)
        with self._failing(preparation):
            model = self._preprocessor
            check_submit(submit, model.vocab_size, model.max_model_len)
            check_task(submit, model.tasks)

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
            for each in (key, *handover.siblings):
                self._report_lost(each, handover.gateway_id, reason)
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

    def _drop(self, key: RequestKey, error: str = "") -> None:
        self._remove_preparation(key, error)
        self._dispatcher.drop(key)

    def _remove_preparation(self, key: RequestKey, error: str = "") -> None:
        if preparation := self._preparations.pop(key, None):
            preparation.span.end({"twinlens.num_items": len(preparation.items)}, error)
            self._prepared_bytes -= sum(item.nbytes for item in preparation.items)
            if preparation.task:
                self._tasks.cancel(preparation.task)

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

    @contextmanager
    def _failing(self, preparation: Preparation) -> Iterator[None]:
        """End the request if the work for it fails."""
        key = preparation.key
        try:
            yield
        except ServingError as e:
            self._drop(key, error=e.code)
            self._fail(key, preparation.gateway_id, e)
        except Exception:  # noqa: BLE001 - the outermost loop: one request must not end the others
            self._log.exception("request failed", request_id=key[0])
            self._drop(key, error="Internal")
            self._fail(key, preparation.gateway_id, Internal(SEE_LOG))

    def _advance(self, preparation: Preparation) -> None:
        """Have the next task done, or hand the request over.

        A request that is apart first takes its turn.
        """
        if self._must_take_turn(preparation):
            self._turn.take(preparation.key, preparation.gateway_id)
            return
        with self._failing(preparation), self._member.progress.unit(self._times, 1):
            if preparation.is_prepared:
                self._hand_over(preparation)
            else:
                preparation.task = self._next_task(preparation)
                self._tasks.start(preparation.task)

    def _next_task(self, preparation: Preparation) -> Task:
        max_patches = max(self._pool.buckets, default=0)
        if preparation.token_ids is not None:
            return preparing(preparation, max_patches)
        submit = preparation.submit
        if submit.task == "detokenize":
            return spelling(submit.prompt.data, names=False)
        has_room = submit.task != "tokenize" and self._has_room_for_items(preparation)
        return reading(preparation, max_patches, has_room)

    def _on_finished(self, finished: Finished) -> None:
        """Use the result of a task, if the request is still there."""
        preparations = self._preparations.values()
        preparation = next((p for p in preparations if p.task is finished.task), None)
        if preparation is None:
            return
        preparation.task = None
        with self._failing(preparation):
            match finished.result:
                case Refused(code=code, message=message, item=item):
                    raise from_code(code, message, item=item)
                case ReadDone():
                    self._on_read(preparation, finished.result, finished.blobs)
                case Prepared(items=items):
                    self._on_prepared(preparation, items, finished.blobs)
                case Spelled():
                    [spelled] = finished.blobs
                    self._convert(preparation, Tensor.of_bytes(spelled))

    def _on_read(self, preparation: Preparation, found: ReadDone, blobs: list[memoryview]) -> None:
        """Go on only if the prompt will fit into the context with its items."""
        token_ids, grammar, words, *patches = blobs
        preparation.token_ids = np.frombuffer(token_ids, np.int64)
        if preparation.submit.guide_kind:
            preparation.grammar = Tensor.of_bytes(grammar)
        if words:
            preparation.bad_words = Tensor.of_bytes(words)
        preparation.sizes = found.sizes
        preparation.num_images = found.num_images
        if preparation.submit.task == "tokenize":
            self._on_tokenized(preparation, found.num_tokens)
            return
        if not len(token_ids):
            raise InvalidRequest("the prompt is empty")
        self._on_prepared(preparation, found.items, patches)
        num_tokens = len(preparation.token_ids) - len(found.sizes) + sum(found.num_tokens)
        max_model_len = self._preprocessor.max_model_len
        submit = preparation.submit
        resolve_stopping(submit.stopping, num_tokens, max_model_len, task=submit.task)
        check_prompt_logprobs(submit.sampling, num_tokens)

    def _on_tokenized(self, preparation: Preparation, num_tokens: Sequence[int]) -> None:
        """Report the tokens of a prompt, those of its items included, or have them named first."""
        submit = preparation.submit
        kinds = [item.kind for item in submit.items]
        assert preparation.token_ids is not None
        ids = self._preprocessor.expanded_ids(preparation.token_ids, kinds, num_tokens)
        preparation.token_ids = ids
        if submit.returns_token_names:
            preparation.task = spelling(Tensor.of(ids).data, names=True)
            self._tasks.start(preparation.task)
        else:
            self._convert(preparation, None)

    def _convert(self, preparation: Preparation, spelled: Tensor | None) -> None:
        """End a request with its result: token ids, perhaps with their names, or their text."""
        submit = preparation.submit
        ids = preparation.token_ids
        num_bytes = (0 if ids is None else ids.nbytes) + (spelled.nbytes if spelled else 0)
        if num_bytes > MAX_CONVERTED_BYTES:
            raise InvalidRequest("the result is too large for one answer: send less at a time")
        self._remove_preparation(preparation.key)
        message = (
            Converted(**submit.ids, text=spelled)
            if ids is None
            else Converted(**submit.ids, token_ids=Tensor.of(ids), token_names=spelled)
        )
        self._member.links.send(preparation.gateway_id, message)

    def _on_prepared(
        self, preparation: Preparation, items: tuple[PreparedFacts, ...], blobs: list[memoryview]
    ) -> None:
        for facts, patches in zip(items, blobs, strict=True):
            item = ready_item(facts, patches)
            preparation.items.append(item)
            self._prepared_bytes += item.nbytes
            preparation.item_seconds.append(facts.seconds)
            self._metrics.item_seconds.labels(item.kind).observe(facts.seconds)
        record_items(self._member.tracing, preparation, items, self._clock())

    def _hand_over(self, preparation: Preparation) -> None:
        """Send the prompt to a language group. Its items follow once the group has room."""
        key = preparation.key
        submit = preparation.submit
        assert preparation.token_ids is not None
        self._sort_items(preparation, preparation.token_ids)
        items = preparation.items
        expanded = self._preprocessor.expand(preparation.token_ids, [*items])
        prompt = self._prompt_of(preparation, expanded)
        hashes = [item.mm_hash for item in items]
        llm = self._groups.choose(expanded, hashes, submit.avoid, submit.adapter)
        if llm is None:
            what = f"has the adapter {submit.adapter!r}" if submit.adapter else "is connected"
            raise Unavailable(f"no language group {what}: try again in a moment", stage="llm")
        ids = Tensor.of(expanded.token_ids) if submit.return_prompt_token_ids else None
        self._remove_preparation(key)
        sizes = Tensor.of(np.array(preparation.sizes, np.int64)) if items else None
        routed = Routed(**request_ids(key), llm=llm, prompt_token_ids=ids, item_sizes=sizes)
        self._member.links.send(preparation.gateway_id, routed)
        siblings = preparation.sibling_keys
        for sibling in siblings:
            also = Routed(**request_ids(sibling), llm=llm)
            self._member.links.send(preparation.gateway_id, also)
        self._member.links.send(llm.id, prompt)
        self._metrics.request_seconds.observe(self._clock() - preparation.received)
        if items:
            pending = {
                i: PendingItem((*key, i), item, priority=submit.priority)
                for i, item in enumerate(items)
            }
            handover = Handover(
                preparation.gateway_id,
                llm,
                preparation.deadline,
                pending,
                traceparent=submit.traceparent,
                siblings=siblings,
            )
            self._dispatcher.begin(key, handover)
        else:
            now = self._clock()
            for each in (key, *siblings):
                self._unconfirmed.append(SentPrompt(now, each, preparation.gateway_id, llm.id))
        self._log.debug(
            "handed over",
            request_id=submit.request_id,
            num_tokens=expanded.num_tokens,
            images=len(items),
        )

    def _sort_items(self, preparation: Preparation, token_ids: np.ndarray) -> None:
        """Put the items into the order of the prompt. A prompt of token ids may mix their kinds."""
        kinds = [item.kind for item in preparation.items]
        order = np.argsort(self._preprocessor.find_placeholders(token_ids, kinds)).tolist()
        preparation.items = [preparation.items[index] for index in order]
        preparation.item_seconds = [preparation.item_seconds[index] for index in order]

    def _prompt_of(self, preparation: Preparation, expanded: ExpandedPrompt) -> Prompt:
        submit = preparation.submit
        max_model_len = self._preprocessor.max_model_len
        defaults = self._preprocessor.defaults
        num_tokens = expanded.num_tokens
        assert submit.task != "tokenize" and submit.task != "detokenize"
        stopping = resolve_stopping(
            submit.stopping, num_tokens, max_model_len, defaults, submit.task
        )
        config = self._preprocessor.checkpoint.generation_config
        return Prompt(
            **submit.ids,
            gateway_id=preparation.gateway_id,
            token_ids=Tensor.of(expanded.token_ids),
            positions=Tensor.of(expanded.positions),
            rope_delta=expanded.rope_delta,
            placeholders=Tensor.of(expanded.placeholders),
            mm_hashes=Tensor.of(hashes_of(preparation.items)),
            sampling=resolve_sampling(submit.sampling, config, defaults),
            stopping=stopping,
            detokenizer=submit.detokenizer,
            timeout=max(0.0, preparation.deadline - self._clock()),
            timings=timings_of(preparation, self._clock()),
            grammar=preparation.grammar,
            output_token_ids=submit.output_token_ids,
            cache_salt=expanded.cache_salt,
            rope_parameter=expanded.rope_parameter,
            adapter=submit.adapter,
            whole=expanded.whole,
            apart=submit.apart_in_llm,
            task=submit.task,
            traceparent=submit.traceparent,
            token_rules=rules_of(preparation),
            priority=submit.priority,
            siblings=submit.siblings,
            reads_tool_calls=submit.reads_tool_calls,
        )

    def _fail(self, key: RequestKey, gateway_id: str, error: ServingError) -> None:
        message = Failed(
            **request_ids(key),
            code=error.code,
            message=shorten(error.message, MAX_ERROR_CHARS),
            stage=error.stage or "preprocess",
            item=error.item,
        )
        self._member.links.send(gateway_id, message)


def hashes_of(items: Sequence[PreparedItem]) -> np.ndarray:
    """uint8 [num_items, 32]."""
    hashes = [list(bytes.fromhex(item.mm_hash)) for item in items]
    return np.array(hashes, np.uint8).reshape(-1, 32)


def rules_of(preparation: Preparation) -> TokenRules | None:
    """Return the token rules of the prompt, with its bad words as token sequences."""
    rules = preparation.submit.token_rules
    if rules is None:
        return None
    return msgspec.structs.replace(rules, bad_words=preparation.bad_words)


def timings_of(preparation: Preparation, now: float) -> Tensor:
    """UTF-8 JSON of what preprocess took, for the request and for each item."""
    timings = {
        "preprocess_seconds": now - preparation.received,
        "images": [{"preprocess_seconds": seconds} for seconds in preparation.item_seconds],
    }
    return Tensor.of_text(json.dumps(timings))
