"""The protocol between preprocess and vision replicas, over a network with arbitrary delays.

Every image ends, even if replicas die in the meantime.
"""

import random
from collections import OrderedDict, deque
from typing import Any

import numpy as np
import pytest

from common.apart import MAX_DEATHS
from common.checkpoint import open_checkpoint
from common.errors import ServingError
from common.events import PeerDown, PeerUp, Received
from common.item_hash import item_hash
from common.member import Posted
from common.messages import Embeddings, ItemReceived, ItemRejected, Peer, RequestKey
from services.preprocess.dispatcher import Dispatcher
from services.preprocess.in_flight import Handover, PendingItem
from services.preprocess.metrics import PreprocessMetrics
from services.preprocess.prepared import ReadyItem
from services.preprocess.vision_pool import VisionPool
from services.vision.cache import EmbeddingCache
from services.vision.encode_times import EncodeTimes
from services.vision.item_rules import ItemRules
from services.vision.metrics import VisionMetrics
from services.vision.room import ANSWER_SECONDS, MAX_GRANTED
from services.vision.worker import Job, JobKey, Worker
from tests.fakes import FakeMember
from tests.golden import GoldenCase
from tests.vision.test_worker import FakeThread, FakeTower

LLM = Peer("llm", "ipc:///llm")
CHECKPOINT = open_checkpoint(GoldenCase("a_image").checkpoint)
STEPS = 1500
POISON = 99
"""A content that ends each replica that works on it."""


class Wire:
    """The messages that a member sends: in order to each peer, in no order between peers."""

    def __init__(self, me: str, net: "Net") -> None:
        self.me = me
        self.net = net

    def connect(self, peer: Peer, role: str) -> None: ...

    def send(self, peer_id: str, message: Any) -> None:
        self.net.queues.setdefault((self.me, peer_id), deque()).append(message)


class Replica:
    def __init__(self, name: str, net: "Net") -> None:
        self.name = name
        self.member = FakeMember()
        self.thread = FakeThread(FakeTower())
        links: Any = Wire(name, net)
        self.member.links = links
        cache = EmbeddingCache(100)
        thread: Any = self.thread
        self.worker = Worker(
            self.member,
            thread,
            cache,
            "float32",
            EncodeTimes(),
            VisionMetrics(cache),
            ItemRules.of(CHECKPOINT),
            lambda: net.now,
        )

    @property
    def jobs(self) -> OrderedDict[JobKey, Job]:
        return self.worker._jobs

    def play(self, *events: Any) -> None:
        self.member.play(self.worker, list(events))
        assert self.worker._num_granted() <= MAX_GRANTED


class Preprocess:
    def __init__(self, name: str, net: "Net") -> None:
        self.name = name
        self.net = net
        self.ended = dict[RequestKey, str]()
        pool = VisionPool(lambda: net.now)
        self.dispatcher = Dispatcher(
            Wire(name, net),
            pool,
            self.fail,
            PreprocessMetrics(pool),
            lambda: net.now,
        )

    @property
    def handovers(self) -> dict[RequestKey, Handover]:
        return self.dispatcher.handovers

    def fail(self, key: RequestKey, gateway_id: str, error: ServingError) -> None:
        self.ended[key] = error.message

    def submit(self, number: int, contents: list[int]) -> None:
        key = (f"{self.name}-r{number}", 0)
        images = {i: PendingItem((*key, i), picture(content)) for i, content in enumerate(contents)}
        self.dispatcher.begin(key, Handover("gateway", LLM, self.net.now + 1e6, images))
        self.dispatcher._start_items(key)
        self.dispatcher.offer_waiting()

    def on_message(self, peer_id: str, message: Any) -> None:
        self.dispatcher.handle_message(peer_id, message)
        self.dispatcher.offer_waiting()


class Net:
    def __init__(self, seed: int, num_preprocess: int, num_replicas: int) -> None:
        self.random = random.Random(seed)
        self.now = 1000.0
        self.queues: dict[tuple[str, str], deque[Any]] = {}
        self.producers = {
            name: Preprocess(name, self) for name in (f"p{n}" for n in range(num_preprocess))
        }
        self.replicas: dict[str, Replica] = {}
        self.num_joined = 0
        self.num_submitted = 0
        self.num_killed = 0
        for _ in range(num_replicas):
            self.add_replica()

    def add_replica(self) -> None:
        self.num_joined += 1
        replica = Replica(f"v{self.num_joined}", self)
        self.replicas[replica.name] = replica
        replica.play(*(PeerUp(name, "preprocess") for name in self.producers))

    def kill_replica(self) -> None:
        self.kill(self.random.choice(sorted(self.replicas)))

    def kill(self, name: str) -> None:
        del self.replicas[name]
        for pair in [pair for pair in self.queues if name in pair]:
            del self.queues[pair]
        for producer in self.producers.values():
            producer.dispatcher.on_replica_down(name, "killed")
            producer.dispatcher.offer_waiting()

    def submit(self) -> None:
        self.num_submitted += 1
        producer = self.random.choice(sorted(self.producers))
        self.producers[producer].submit(
            self.num_submitted,
            [self.random.randrange(12) for _ in range(self.random.randint(1, 4))],
        )

    def kill_replicas_with(self, content: int) -> None:
        """Kill each replica whose tower works on this content, and start another one for it."""
        for name, replica in list(self.replicas.items()):
            encoding = replica.worker._encoding
            if encoding is not None and encoding.offer.mm_hash == mm_hash_of(content):
                self.kill(name)
                self.add_replica()
                self.num_killed += 1

    def abort(self) -> None:
        for producer in self.producers.values():
            if producer.handovers:
                producer.dispatcher.drop(self.random.choice(sorted(producer.handovers)))
                return

    def lose_preprocess(self) -> None:
        """End the lease between a preprocess and a replica, and let the preprocess connect again.

        The messages in flight between them are lost.
        """
        replica = self.random.choice(list(self.replicas.values()))
        producer = self.random.choice(list(self.producers.values()))
        self.queues.pop((replica.name, producer.name), None)
        self.queues.pop((producer.name, replica.name), None)
        producer.dispatcher.on_replica_down(replica.name, "its lease ended")
        replica.play(PeerDown(producer.name, "preprocess", "its lease ended"))
        replica.play(PeerUp(producer.name, "preprocess"))
        producer.dispatcher.offer_waiting()

    def deliver(self) -> bool:
        waiting = sorted(pair for pair, queue in self.queues.items() if queue)
        if waiting:
            sender, receiver = self.random.choice(waiting)
            self.handle(sender, receiver, self.queues[sender, receiver].popleft())
        return bool(waiting)

    def handle(self, sender: str, receiver: str, message: Any) -> None:
        if receiver in self.replicas:
            self.replicas[receiver].play(Received(sender, "preprocess", message))
        elif receiver in self.producers:
            self.producers[receiver].on_message(sender, message)
        elif isinstance(message, Embeddings):
            name = {
                "request_id": message.request_id,
                "attempt": message.attempt,
                "item": message.item,
            }
            answer = (
                ItemReceived(**name)
                if self.random.random() < 0.97
                else ItemRejected(**name, reason="not finite")
            )
            self.queues.setdefault(("llm", message.preprocess_id), deque()).append(answer)

    def finish(self) -> bool:
        working = [replica for replica in self.replicas.values() if replica.thread.work]
        if working:
            replica = self.random.choice(working)
            replica.play(Posted(replica.thread.result()))
        return bool(working)

    def settle(self) -> None:
        """Deliver and finish everything without new requests; unused grants expire."""
        for _ in range(20_000):
            self.kill_replicas_with(POISON)
            if not self.deliver() and not self.finish():
                if not any(p.handovers for p in self.producers.values()) and not any(
                    r.jobs for r in self.replicas.values()
                ):
                    return
                self.now += ANSWER_SECONDS + 0.1
                for replica in self.replicas.values():
                    replica.play()
                for producer in self.producers.values():
                    producer.dispatcher.offer_waiting()
        raise AssertionError("some images never end")


def picture(content: int) -> ReadyItem:
    rows = rows_of(content)
    return ReadyItem("image", mm_hash_of(content), (1, 2, 2), (28, 28), 4, 1, rows)


def rows_of(content: int) -> np.ndarray:
    return np.full((4, 588), content + 1, np.uint8)


def mm_hash_of(content: int) -> str:
    patches = rows_of(content).data
    return item_hash(CHECKPOINT.fingerprint, "image", (1, 2, 2), (28, 28), patches)


@pytest.mark.parametrize("seed", range(24))
def test_every_image_ends_and_nothing_is_held_afterwards(seed: int) -> None:
    net = Net(seed, num_preprocess=1 + seed % 3, num_replicas=2 + seed % 4)
    actions = {
        net.deliver: 60,
        net.finish: 12,
        net.submit: 6,
        net.abort: 1,
        net.lose_preprocess: 0.3,
    }
    for _ in range(STEPS):
        action: Any = net.random.choices(list(actions), list(actions.values()))[0]
        action()
        net.now += net.random.choice([0.0, 0.01, 0.3])
        if net.random.random() < 0.004:
            net.add_replica()
            net.kill_replica()
    net.settle()
    assert net.num_submitted > 50
    for producer in net.producers.values():
        assert (
            not producer.handovers
            and not producer.dispatcher.pool.num_waiting
            and producer.dispatcher.num_bytes == 0
        )
        assert all("attempts" in e or "in a row" in e for e in producer.ended.values()), (
            "only images that failed three times fail"
        )
    for replica in net.replicas.values():
        assert not replica.jobs and replica.worker._num_granted() == 0


@pytest.mark.parametrize("seed", range(12))
def test_only_images_that_end_replicas_fail_whatever_works_next_to_them(seed: int) -> None:
    net = Net(seed, num_preprocess=1 + seed % 3, num_replicas=1 + seed % 4)
    poisoned = set[RequestKey]()
    for _ in range(STEPS):
        action: Any = net.random.choices([net.deliver, net.finish, net.submit], [60, 12, 4])[0]
        action()
        if net.random.random() < 0.005:
            net.num_submitted += 1
            producer = net.random.choice(list(net.producers.values()))
            producer.submit(net.num_submitted, [net.random.randrange(12), POISON])
            poisoned.add((f"{producer.name}-r{net.num_submitted}", 0))
        net.kill_replicas_with(POISON)
        net.now += net.random.choice([0.0, 0.01, 0.3])
    net.settle()
    failed = {key: e for p in net.producers.values() for key, e in p.ended.items()}
    assert poisoned and {key for key, e in failed.items() if "in a row" in e} == poisoned
    assert net.num_killed <= MAX_DEATHS * len(poisoned)


def test_with_several_producers_and_no_faults_no_replica_is_idle_while_images_wait() -> None:
    """In each round all messages in flight arrive, and each tower finishes one image."""
    net = Net(1, num_preprocess=3, num_replicas=4)
    for _ in range(60):
        net.submit()
    idle_rounds = 0
    rounds = 0
    while any(producer.handovers for producer in net.producers.values()):
        while net.deliver():
            pass
        waiting = sum(producer.dispatcher.pool.num_waiting for producer in net.producers.values())
        idle = sum(not replica.thread.work for replica in net.replicas.values())
        rounds += 1
        idle_rounds += bool(waiting and idle)
        for replica in list(net.replicas.values()):
            if replica.thread.work:
                replica.play(Posted(replica.thread.result()))
        net.now += 0.1
    assert idle_rounds <= rounds * 0.05
