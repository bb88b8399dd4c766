"""What a language group's metrics say after some steps of an engine."""

from services.llm.engine import Engine
from tests.llm.builders import BLOCK_SIZE, create_prompt
from tests.llm.test_engine import NUM_BLOCKS, create_engine, outputs_of

CAPACITY = NUM_BLOCKS * BLOCK_SIZE


def value(engine: Engine, name: str, **labels: str) -> float | None:
    return engine.metrics.registry.get_sample_value(f"twinlens_llm_{name}", labels)


def test_steps_are_counted_by_what_they_computed() -> None:
    engine = create_engine()
    engine.add(create_prompt("a", num_tokens=8, max_tokens=3))
    engine.step()
    assert value(engine, "step_seconds_count", phase="prefill") == 1
    engine.add(create_prompt("b", num_tokens=9, max_tokens=2))
    engine.step()
    assert value(engine, "step_seconds_count", phase="mixed") == 1
    outputs_of(engine)
    assert value(engine, "step_seconds_count", phase="decode") == 1
    # The second prompt has 8 tokens in common with the first, of which 8 are whole blocks.
    assert value(engine, "step_tokens_sum") == 8 + (1 + 1) + (1 + 1)
    assert value(engine, "step_tokens_count") == 3


def test_the_prefix_cache_is_counted_in_tokens_once_for_each_request() -> None:
    engine = create_engine()
    for name in ("a", "b"):
        engine.add(create_prompt(name, num_tokens=9, max_tokens=1))
        outputs_of(engine)
    assert value(engine, "prefix_cache_query_tokens_total") == 18
    assert value(engine, "prefix_cache_hit_tokens_total") == 8


def test_a_prompt_that_never_uses_the_prefix_cache_does_not_query_it() -> None:
    engine = create_engine()
    engine.add(create_prompt(num_tokens=9, max_tokens=1, whole=True))
    outputs_of(engine)
    assert value(engine, "prefix_cache_query_tokens_total") == 0


def test_the_use_of_the_kv_cache_and_the_requests_are_read_from_the_scheduler() -> None:
    engine = create_engine()
    assert value(engine, "kv_cache_capacity_tokens") == CAPACITY
    assert value(engine, "kv_cache_usage_ratio") == 0
    engine.add(create_prompt("a", num_tokens=2 * BLOCK_SIZE - 1, max_tokens=2))
    assert value(engine, "requests_waiting") == 1
    engine.step()
    assert (value(engine, "requests_waiting"), value(engine, "requests_running")) == (0, 1)
    assert value(engine, "kv_cache_usage_ratio") == 2 / NUM_BLOCKS


def test_the_room_for_embeddings_shrinks_by_what_is_reserved() -> None:
    engine = create_engine()
    capacity = value(engine, "embedding_capacity_tokens")
    assert capacity == value(engine, "embedding_free_tokens") == 2 * CAPACITY
    engine.add(create_prompt(images=((2, 5, 1),)))
    assert engine.budget.take_reserved()
    assert value(engine, "embedding_free_tokens") == capacity - 5


def test_preemptions_are_counted() -> None:
    engine = create_engine()
    for name, first in (("a", 1), ("b", 2)):
        ids = [first] * (CAPACITY // 2 - 1)
        engine.add(create_prompt(name, token_ids=ids, max_tokens=8))
    outputs_of(engine)
    assert value(engine, "preemptions_total") == engine.scheduler.num_preemptions > 0


def test_the_expected_delay_is_known_once_requests_have_waited() -> None:
    engine = create_engine(max_num_seqs=1)
    assert engine.expected_delay == 0
    for name in ("a", "b", "c", "d"):
        engine.add(create_prompt(name, max_tokens=1))
    engine.step()
    engine.step()
    assert len(engine.scheduler.waiting) == 2 and engine.expected_delay > 0
    outputs_of(engine)
    assert engine.expected_delay == 0
