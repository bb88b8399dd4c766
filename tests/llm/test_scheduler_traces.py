"""Whatever comes in whatever order: every request ends, with the answer it would have had alone."""

from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from services.llm.request import Request
from services.llm.scheduler import Scheduler
from tests.llm.builders import (
    BLOCK_SIZE,
    FakeRunner,
    Image,
    create_request,
    create_scheduler,
    expected_output,
    give_embeddings,
    run_step,
)

NUM_BLOCKS = 8
"""So few that two requests of full length do not fit."""
MAX_TOKENS = NUM_BLOCKS * BLOCK_SIZE


@dataclass(frozen=True)
class Arrival:
    """One request of a trace, in steps of the scheduler."""

    at: int
    token_ids: list[int]
    images: tuple[Image, ...]
    max_tokens: int
    salt: bytes
    images_after: tuple[int, ...]
    """Steps from the arrival to each image's embeddings."""
    aborted_after: int | None


@st.composite
def arrivals(draw: st.DrawFn) -> Arrival:
    """Requests that resemble one another: their prompts begin alike, with images of two kinds at
    the same places."""
    length = draw(st.integers(1, MAX_TOKENS - 1))
    token_ids = [1] * length
    for index in draw(st.lists(st.integers(0, length - 1), max_size=1)):
        token_ids[index] = 2
    places = [(2, 6), (8, 3), (11, 9)][: draw(st.integers(0, 3))]
    images = tuple(
        (offset, size, draw(st.integers(0, 1)))
        for offset, size in places
        if offset + size <= length
    )
    return Arrival(
        at=draw(st.integers(0, 40)),
        token_ids=token_ids,
        images=images,
        max_tokens=draw(st.integers(1, MAX_TOKENS - length)),
        salt=draw(st.sampled_from([b"", b"", b"", b"tenant"])),
        images_after=tuple(draw(st.integers(0, 40)) for _ in images),
        aborted_after=draw(st.none() | st.integers(0, 20)),
    )


@dataclass
class Trace:
    """Plays arrivals, embeddings and aborts to a scheduler, one step at a time."""

    scheduler: Scheduler
    arrivals: list[Arrival]
    runner: FakeRunner = field(default_factory=lambda: FakeRunner(NUM_BLOCKS))
    requests: dict[int, Request] = field(default_factory=dict)
    aborted: set[int] = field(default_factory=set)
    first_steps: dict[int, int] = field(default_factory=dict)
    """By the id of the request."""
    now: int = 0

    def is_under_way(self, request: Request) -> bool:
        return request in self.scheduler.running or request in self.scheduler.waiting

    def play(self) -> None:
        last_event = max(a.at + max((*a.images_after, a.aborted_after or 0)) for a in self.arrivals)
        # Far more than all requests one after the other take, each computed anew for every other:
        # only a livelock lasts longer.
        bound = last_event + sum(
            1 + len(self.arrivals) * (len(a.token_ids) + a.max_tokens) for a in self.arrivals
        )
        while self.now <= last_event or self.scheduler.running or self.scheduler.waiting:
            assert self.now <= bound, "no end"
            self.happen()
            for chunk in run_step(self.scheduler, self.runner):
                self.first_steps.setdefault(id(chunk.request), self.now)
            self.now += 1

    def happen(self) -> None:
        for i, arrival in enumerate(self.arrivals):
            since = self.now - arrival.at
            if since == 0:
                images = arrival.images
                ids = arrival.token_ids
                self.requests[i] = create_request(
                    str(i),
                    max_tokens=arrival.max_tokens,
                    images=images,
                    token_ids=ids,
                    salt=arrival.salt,
                    has_embeddings=False,
                )
                self.scheduler.add(self.requests[i])
            for image, after in enumerate(arrival.images_after):
                if since == after:
                    give_embeddings(self.requests[i], image)
            if since == arrival.aborted_after and self.is_under_way(self.requests[i]):
                self.scheduler.finish(self.requests[i])
                self.aborted.add(i)


traces = st.lists(arrivals(), min_size=1, max_size=8)


@settings(max_examples=300)
@given(
    trace=traces,
    max_num_seqs=st.integers(1, 4),
    budget=st.integers(1, 20),
    prefix_caching=st.booleans(),
)
def test_every_request_ends_with_the_answer_it_has_alone(
    trace: list[Arrival], max_num_seqs: int, budget: int, prefix_caching: bool
) -> None:
    scheduler = create_scheduler(
        num_blocks=NUM_BLOCKS,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        prefix_caching=prefix_caching,
    )
    played = Trace(scheduler, trace)
    played.play()
    assert scheduler.pool.num_free == NUM_BLOCKS
    for i, request in played.requests.items():
        expected = expected_output(request)
        assert request.output_token_ids == (
            expected[: len(request.output_token_ids)] if i in played.aborted else expected
        )


@settings(max_examples=100)
@given(trace=traces, budget=st.integers(1, 20))
def test_texts_begin_in_the_order_in_which_they_came(trace: list[Arrival], budget: int) -> None:
    scheduler = create_scheduler(num_blocks=NUM_BLOCKS, max_num_batched_tokens=budget)
    texts = [replace(arrival, images=(), images_after=(), aborted_after=None) for arrival in trace]
    played = Trace(scheduler, texts)
    played.play()
    first_steps = [
        played.first_steps[id(r)]
        for _, r in sorted(played.requests.items(), key=lambda item: (texts[item[0]].at, item[0]))
    ]
    assert first_steps == sorted(first_steps)
