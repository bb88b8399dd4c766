"""Buckets as they are given, and which of them an image goes into."""

import pytest

from common.buckets import bucket_of, parse_buckets
from common.config import BadSetting


@pytest.mark.parametrize(
    ("num_patches", "bucket"), [(4, 1024), (1024, 1024), (1028, 2048), (5120, 5120), (5124, 0)]
)
def test_an_image_goes_into_the_smallest_bucket_that_holds_it(
    num_patches: int, bucket: int
) -> None:
    assert bucket_of(num_patches, (1024, 2048, 5120)) == bucket


@pytest.mark.parametrize(("num_patches", "size"), [(1, 1), (64, 64), (65, 128), (4784, 8192)])
def test_without_buckets_times_are_measured_by_powers_of_two(num_patches: int, size: int) -> None:
    assert bucket_of(num_patches, ()) == size


@pytest.mark.parametrize(
    ("text", "buckets"),
    [("", ()), ("1024,2048,5120", (1024, 2048, 5120)), (" 64 , 16,64", (16, 64))],
)
def test_buckets_are_given_as_numbers_with_commas(text: str, buckets: tuple[int, ...]) -> None:
    assert parse_buckets(text, 4) == buckets


@pytest.mark.parametrize(
    "text", ["many", "64,x", "0", "-64", "62", ",".join(str(4 * n) for n in range(1, 40))]
)
def test_what_is_no_bucket_is_refused_by_name(text: str) -> None:
    with pytest.raises(BadSetting, match="--vision-buckets"):
        parse_buckets(text, 4)


def test_a_family_says_of_what_buckets_are_multiples() -> None:
    assert parse_buckets("62", 2) == (62,)
    with pytest.raises(BadSetting, match="multiples of 16"):
        parse_buckets("64,72", 16)
