"""What can be computed of a request, and the names of its blocks."""

import re
import time
from typing import Any

import msgspec
import numpy as np
import pytest

from common.wire import Tensor
from services.llm.request import Limits, Request, objection_to
from tests.llm.builders import create_prompt, create_request, give_embeddings

TWO_IMAGES = ((3, 4, 0), (9, 5, 1))


def names(block_size: int = 4, output: tuple[int, ...] = (), **fields: Any) -> list[bytes]:
    request = create_request(**{"num_tokens": 16} | fields)
    request.output_token_ids.extend(output)
    return request.block_hashes(request.num_tokens // block_size, block_size)


def num_common(a: list[bytes], b: list[bytes]) -> int:
    return sum(x == y for x, y in zip(a, b, strict=True))


def test_a_text_can_be_computed_to_its_end() -> None:
    assert create_request(num_tokens=8).num_wanted == 8


def test_a_prompt_can_be_computed_up_to_the_first_image_that_is_missing() -> None:
    request = create_request(num_tokens=16, images=TWO_IMAGES, has_embeddings=False)
    assert request.num_computable(0) == 3
    give_embeddings(request, 1)
    assert request.num_computable(0) == 3
    give_embeddings(request, 0)
    assert request.num_computable(0) == 16


def test_the_second_image_stops_what_the_first_no_longer_does() -> None:
    request = create_request(num_tokens=16, images=TWO_IMAGES, has_embeddings=False)
    give_embeddings(request, 0)
    assert request.num_computable(0) == 9


def test_an_image_whose_placeholders_are_computed_is_not_missed() -> None:
    request = create_request(num_tokens=16, images=TWO_IMAGES, has_embeddings=False)
    assert request.num_computable(7) == 9
    assert request.num_computable(14) == 16


def test_nothing_can_be_computed_from_within_an_image_that_is_missing() -> None:
    request = create_request(num_tokens=16, images=TWO_IMAGES, has_embeddings=False)
    assert request.num_computable(6) == 6


def test_tokens_run_from_the_prompt_into_the_output() -> None:
    request = create_request(token_ids=[5, 6, 7])
    request.output_token_ids += [8, 9]
    assert [
        request.tokens(0, 2).tolist(),
        request.tokens(1, 4).tolist(),
        request.tokens(4, 5).tolist(),
    ] == [[5, 6], [6, 7, 8], [9]]


def test_positions_of_generated_tokens_are_index_and_delta() -> None:
    request = create_request(num_tokens=6, images=((1, 2, 0),), rope_delta=-3)
    request.output_token_ids += [8, 9]
    assert request.positions_of(1, 8).tolist() == [
        [1, 2, 3, 4, 5, 3, 4],
        [6, 7, 3, 4, 5, 3, 4],
        [6, 7, 3, 4, 5, 3, 4],
    ]


def test_equal_requests_have_equal_block_names() -> None:
    assert names(images=TWO_IMAGES) == names(images=TWO_IMAGES)
    assert len(set(names(token_ids=[1] * 16))) == 4


def test_a_token_renames_its_block_and_all_that_follow() -> None:
    changed = [*range(1, 6), 40, *range(7, 17)]
    assert names()[:1] == names(token_ids=changed)[:1]
    assert num_common(names(), names(token_ids=changed)) == 1


def test_the_salt_renames_every_block() -> None:
    assert num_common(names(), names(salt=b"tenant")) == 0


def test_another_image_renames_the_blocks_from_its_first_on() -> None:
    assert num_common(names(images=((6, 2, 0),)), names(images=((6, 2, 1),))) == 1


def test_two_images_in_one_block_both_count() -> None:
    kinds = [names(num_tokens=4, images=((0, 2, a), (2, 2, b))) for a in (0, 1) for b in (0, 1)]
    assert len({one[0] for one in kinds}) == 4


def test_the_same_placeholders_cut_otherwise_into_images_are_not_the_same() -> None:
    """Equal tokens, equal positions, equal images: only which rows of an image they show
    differs."""
    assert names(num_tokens=4, images=((0, 1, 0), (1, 3, 0))) != names(
        num_tokens=4, images=((0, 3, 0), (3, 1, 0))
    )


def test_positions_are_part_of_the_name() -> None:
    """The same pixels of another grid."""
    one = create_request(num_tokens=4)
    other = create_request(num_tokens=4)
    other.positions = other.positions + 1
    assert one.block_hashes(1, 4) != other.block_hashes(1, 4)


def test_output_tokens_are_named_like_prompt_tokens() -> None:
    told = names(num_tokens=16, rope_delta=0)
    assert names(token_ids=list(range(1, 7)), output=tuple(range(7, 17)), rope_delta=0) == told


def test_names_made_in_pieces_are_those_made_at_once() -> None:
    request = create_request(num_tokens=16, images=TWO_IMAGES)
    pieces = [request.block_hashes(count, 4) for count in (1, 2, 4)]
    assert pieces == [names(images=TWO_IMAGES)[:count] for count in (1, 2, 4)]
    assert request.block_hashes(2, 4) == pieces[1]


def test_naming_a_prompt_costs_in_proportion_to_its_length() -> None:
    """4,000 tokens take under a millisecond on an idle core; the bound is what no load of a test
    machine reaches."""
    request = create_request(token_ids=np.arange(1, 4001).tolist(), images=((100, 3000, 0),))
    seconds = min(timed_naming(request) for _ in range(5))
    assert seconds < 0.02


def timed_naming(request: Request) -> float:
    request._block_hashes.clear()
    began = time.perf_counter()
    request.block_hashes(250, 16)
    return time.perf_counter() - began


IMAGES = ((2, 3, 1), (6, 2, 2))


def test_a_prompt_whose_tensors_fit_each_other_is_taken() -> None:
    assert (
        objection_to(create_prompt(num_tokens=10, images=IMAGES), Limits(3, 14, 100, 16, 50)) == ""
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"token_ids": Tensor.of(np.zeros((2, 5), np.int64))}, "token_ids"),
        ({"token_ids": Tensor.of(np.zeros(10, np.float32))}, "token_ids"),
        ({"positions": Tensor.of(np.zeros((3, 9), np.int64))}, "positions"),
        ({"placeholders": Tensor.of(np.zeros((2, 3), np.int64))}, "placeholders"),
        ({"mm_hashes": Tensor.of(np.zeros((1, 32), np.uint8))}, "mm_hashes"),
        ({"placeholders": Tensor.of(np.array([[2, 3], [4, 2]]))}, "4 \\+ 2 lies"),
        ({"placeholders": Tensor.of(np.array([[2, 3], [9, 2]]))}, "9 \\+ 2 lies"),
        ({"placeholders": Tensor.of(np.array([[-1, 3], [6, 2]]))}, "-1 \\+ 3 lies"),
    ],
)
def test_one_whose_tensors_do_not_is_refused_by_what_is_wrong(
    changes: dict[str, Tensor], words: str
) -> None:
    prompt = msgspec.structs.replace(create_prompt(num_tokens=10, images=IMAGES), **changes)
    assert re.search(words, objection_to(prompt, Limits(3, 1000, 1000, 1000, 50)))


def test_placeholders_alone_may_lie_outside_the_vocabulary() -> None:
    token_ids = np.array([1, 1, 50, 50, 50, 1, 50, 50, 1, 1])
    limits = Limits(3, 1000, 1000, 1000, 50)
    prompt = msgspec.structs.replace(
        create_prompt(num_tokens=10, images=IMAGES), token_ids=Tensor.of(token_ids)
    )
    assert objection_to(prompt, limits) == ""
    token_ids[5] = 50
    assert "token_ids has a value outside [0, 50)" in objection_to(prompt, limits)


def test_one_that_can_never_fit_is_refused_with_the_numbers() -> None:
    prompt = create_prompt(num_tokens=10, max_tokens=4)
    assert re.search("14 tokens.* the 13 ", objection_to(prompt, Limits(3, 13, 100, 16, 50)))
    with_images = create_prompt(num_tokens=16, images=TWO_IMAGES)
    assert "room for the embeddings of 4" in objection_to(with_images, Limits(3, 100, 4, 16, 50))


def test_a_prompt_that_must_be_whole_must_fit_into_one_step() -> None:
    prompt = create_prompt(num_tokens=10, max_tokens=4, whole=True)
    assert objection_to(prompt, Limits(3, 100, 100, 14, 50)) == ""
    assert "--max-num-batched-tokens 14" in objection_to(prompt, Limits(3, 100, 100, 13, 50))
