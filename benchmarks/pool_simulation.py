"""The dispatcher of preprocess and the worker of vision, in one process and in simulated time.

All decisions are those of the real classes. Only the tower, the connections and the language group
are simulated: the tower waits, a message arrives after a fixed time, and the group accepts at once.
"""

import heapq
import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.pool_loads import SIZES, Arrival, Finished, Spec
from common.checkpoint import open_checkpoint
from common.events import PeerUp, Received
from common.member import Posted
from common.messages import Embeddings, ItemKey, ItemReceived, Offer, Peer, Reserved
from common.settings import EMBEDDED_MODEL
from common.tracing import NO_TRACING
from common.wire import Tensor
from services.preprocess.dispatcher import Dispatcher
from services.preprocess.in_flight import Handover, PendingItem
from services.preprocess.metrics import PreprocessMetrics
from services.preprocess.prepared import ReadyItem
from services.preprocess.vision_pool import VisionPool
from services.vision.cache import EmbeddingCache
from services.vision.encode_times import EncodeTimes
from services.vision.item_rules import ItemRules
from services.vision.metrics import VisionMetrics
from services.vision.tower_thread import EncodeResult, ItemShape
from services.vision.worker import Worker

MESSAGE_SECONDS = 0.0002
GROUP = Peer("llm", "ipc:///llm")
NO_PATCHES = np.zeros((1, 1), np.uint8)
EMBEDDINGS = Tensor.of(np.zeros((1, 1), np.float32))


class Clock:
    """Simulated time, and what happens when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def __call__(self) -> float:
        return self.now

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), event))

    def run(self) -> None:
        """Let everything happen."""
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()


@dataclass(slots=True)
class Costs:
    """CPU seconds of both services, and the messages between them."""

    preprocess: float = 0.0
    vision: float = 0.0
    messages: Counter[str] = field(default_factory=Counter)


class Net:
    """Carries messages between the simulated processes, each of which has a `receive`."""

    def __init__(self, clock: Clock, costs: Costs) -> None:
        self.clock = clock
        self.costs = costs
        self.receivers: dict[str, Callable[[str, Any], None]] = {}

    def links_of(self, sender: str) -> "SimulatedLinks":
        return SimulatedLinks(self, sender)


class SimulatedLinks:
    """The connections of one process."""

    def __init__(self, net: Net, sender: str) -> None:
        self._net = net
        self._sender = sender

    def connect(self, peer: Peer, role: str) -> None:
        """Do nothing: everybody is connected."""

    def send(self, peer_id: str, message: Any) -> None:
        self._net.costs.messages[type(message).__name__] += 1
        if receive := self._net.receivers.get(peer_id):
            self._net.clock.after(MESSAGE_SECONDS, lambda: receive(self._sender, message))


class AnyItem(ItemRules):
    """Accepts what is offered: the items of a simulation have no pixels."""

    def objection_to(self, offer: Offer) -> str:
        return ""

    def objection_to_patches(self, offer: Offer, patches: Tensor) -> str:
        return ""

    def shape_of(self, offer: Offer) -> ItemShape:
        return ItemShape(offer.grid_thw, offer.content_size)


class SimulatedItem(ReadyItem):
    """An item without pixels."""

    def patches(self) -> np.ndarray:
        return NO_PATCHES


class Replica:
    """A vision replica: the real worker, and a tower that waits. It is the worker's member, too."""

    def __init__(self, name: str, spec: Spec, net: Net, rules: ItemRules) -> None:
        self.id = name
        self.tracing = NO_TRACING
        self.spec = spec
        self.links = net.links_of(name)
        self.expected_delay = 0.0
        self.begun: dict[ItemKey, float] = {}
        """When the tower began each item."""
        self._net = net
        self._sizes: dict[ItemKey, int] = {}
        cache = EmbeddingCache(2**20)
        member: Any = self
        self.worker = Worker(
            member,
            member,
            cache,
            "float32",
            measured_times(spec),
            VisionMetrics(cache),
            rules,
            net.clock,
        )
        net.receivers[name] = self.receive

    def track_load(self, load: Callable[[], tuple[int, int]]) -> None:
        """Nobody asks for the load."""

    def receive(self, sender: str, message: Any) -> None:
        if isinstance(message, Offer):
            self._sizes[message.item_key] = message.num_patches
        self._step(Received(sender, "preprocess", message))

    def connect(self, preprocess_id: str) -> None:
        self._step(PeerUp(preprocess_id, "preprocess", preprocess_id))

    def begin(self, key: ItemKey, patches: Tensor, shape: ItemShape) -> None:
        """Encode an item: the tower's method."""
        self.begun[key] = began = self._net.clock.now
        seconds = self.spec.seconds(self._sizes.pop(key))
        result = EncodeResult(key, began, seconds, EMBEDDINGS)
        self._net.clock.after(seconds, lambda: self._step(Posted(result)))

    def _step(self, event: Any) -> None:
        began = time.thread_time()
        self.worker.step([event])
        self._net.costs.vision += time.thread_time() - began


def measured_times(spec: Spec) -> EncodeTimes:
    """Return the times of a replica that has encoded items of every size before."""
    times = EncodeTimes(spec.buckets)
    for num_patches in filter(spec.fits, SIZES):
        times.record(num_patches, spec.seconds(num_patches))
    times.changed_notably()
    return times


class Preprocess:
    """A preprocess after its items are prepared: the real dispatcher and pool."""

    def __init__(self, name: str, net: Net) -> None:
        self.name = name
        self._net = net
        self.pool = VisionPool(net.clock)
        self.dispatcher = Dispatcher(
            net.links_of(name), self.pool, fail, PreprocessMetrics(self.pool), net.clock
        )
        net.receivers[name] = self.receive

    def receive(self, sender: str, message: Any) -> None:
        began = time.thread_time()
        self.dispatcher.handle_message(sender, message)
        self.dispatcher.offer_waiting()
        self._net.costs.preprocess += time.thread_time() - began

    def add(self, arrival: Arrival) -> None:
        """Let an item arrive, for which the language group has room."""
        size = arrival.num_patches
        item = SimulatedItem(
            "image", f"{arrival.content:064x}", (1, 1, size), (14, 14), size, size // 4, NO_PATCHES
        )
        key = (f"r{arrival.content}", 0)
        handover = Handover("gateway", GROUP, 1e9, {0: PendingItem((*key, 0), item)})
        self.dispatcher.begin(key, handover)
        self.receive(GROUP.id, Reserved(request_id=key[0], attempt=0))


def fail(key: Any, gateway_id: str, error: Exception) -> None:
    raise AssertionError(f"{key} failed: {error}")


def simulate(
    fleet: Sequence[Spec], num_preprocess: int, items: Sequence[Arrival]
) -> tuple[Finished, Costs]:
    """Return what became of the items, and what that cost."""
    clock = Clock()
    costs = Costs()
    net = Net(clock, costs)
    rules = AnyItem(open_checkpoint(EMBEDDED_MODEL), 2**20, frozenset({"image"}))
    replicas = [Replica(f"vision-{n}", spec, net, rules) for n, spec in enumerate(fleet)]
    preprocesses = [Preprocess(f"preprocess-{n}", net) for n in range(num_preprocess)]

    def receive_embeddings(sender: str, message: Embeddings) -> None:
        received = ItemReceived(**message.item_ids)
        net.links_of(GROUP.id).send(message.preprocess_id, received)

    net.receivers[GROUP.id] = receive_embeddings
    for replica in replicas:
        for preprocess in preprocesses:
            replica.connect(preprocess.name)
    clock.run()
    costs.__init__()  # type: ignore[misc]
    begin = clock.now
    for item in items:
        add = preprocesses[item.preprocess].add
        clock.after(item.time, lambda add=add, item=item: add(item))  # type: ignore[misc]
    clock.run()
    begun = {key: when for replica in replicas for key, when in replica.begun.items()}
    waits = [begun[f"r{item.content}", 0, 0] - begin - item.time for item in items]
    return Finished(waits, [when - begin for when in begun.values()]), costs
