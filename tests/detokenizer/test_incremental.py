"""The pieces of an answer, joined, are its decoded text up to a stop string."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from common.checkpoint import BadCheckpoint
from common.vocabulary.tokenizer_json import read_tokenizer_json
from services.detokenizer.incremental import IncrementalDecoder, logprob_entry
from tests import golden_vocabularies

GOLDEN = Path(__file__).parents[1] / "golden" / "qwen2_5_vl"
CASES = ("a_image", "b_two_images_tied", "c_gqa_tp8", "d_text")
FILES = {case: GOLDEN / case / "checkpoint" / "tokenizer.json" for case in CASES}
TOKENIZERS = {case: Tokenizer.from_file(str(file)) for case, file in FILES.items()}
VOCABULARIES = {case: read_tokenizer_json(file) for case, file in FILES.items()}
TOKENIZER = TOKENIZERS["a_image"]
VOCABULARY = VOCABULARIES["a_image"]


def ids_of(text: str) -> list[int]:
    """Return one token per byte, so that every border is a token border."""
    by_bytes = {data: id for id, data in VOCABULARY.bytes_by_id.items()}
    return [by_bytes[bytes([byte])] for byte in text.encode()]


def pieces(decoder: IncrementalDecoder, token_ids: list[int]) -> list[str]:
    return [*[decoder.push([token_id]) for token_id in token_ids], decoder.finish()]


def expected(case: str) -> dict:
    return json.loads((GOLDEN / case / "expected" / "expected.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_golden_answers_come_out_exactly(case: str) -> None:
    want = expected(case)
    for key, skip in (("greedy_text", False), ("greedy_text_skip_special", True)):
        assert want[key]
        assert (
            "".join(
                pieces(
                    IncrementalDecoder(VOCABULARIES[case], skip_special_tokens=skip),
                    want["greedy_ids"],
                )
            )
            == want[key]
        )


@pytest.mark.parametrize("case", CASES)
def test_golden_probes_come_out_exactly(case: str) -> None:
    probes = expected(case)["tokenizer_probes"]
    assert probes
    for probe in probes:
        found = pieces(
            IncrementalDecoder(VOCABULARIES[case], skip_special_tokens=False), probe["ids"]
        )
        assert "".join(found) == probe["decoded"]


# Byte tokens (most of them no UTF-8 alone), all tokens with the special ones, and ids beyond the
# tokenizer.
token_ids = st.lists(
    st.one_of(st.integers(128, 255), st.integers(0, 255), st.integers(256, 600), st.just(2**40)),
    max_size=30,
)


@settings(max_examples=500)
@given(st.sampled_from(CASES), token_ids, st.booleans(), st.lists(st.integers(0, 29), max_size=4))
def test_joined_pieces_equal_the_tokenizers_decode(
    case: str, ids: list[int], skip: bool, cuts: list[int]
) -> None:
    decoder = IncrementalDecoder(VOCABULARIES[case], skip_special_tokens=skip)
    borders = [0, *sorted(cuts), len(ids)]
    found = [decoder.push(ids[begin:end]) for begin, end in itertools.pairwise(borders)] + [
        decoder.finish()
    ]
    known = [id for id in ids if id < 2**32]
    assert "".join(found) == TOKENIZERS[case].decode(known, skip_special_tokens=skip)


utf8_like = st.lists(
    st.sampled_from(
        [0xF0, 0x9F, 0x98, 0x80, 0xED, 0xA0, 0xC0, 0xE2, 0x82, 0xAC, 0xF4, 0x90, 0xFF, 0x41]
    ),
    max_size=12,
)


@settings(max_examples=500)
@given(utf8_like)
def test_broken_characters_become_as_many_marks_as_in_the_tokenizer(data: list[int]) -> None:
    by_bytes = {data: id for id, data in VOCABULARY.bytes_by_id.items()}
    ids = [by_bytes[bytes([byte])] for byte in data]
    assert "".join(pieces(IncrementalDecoder(VOCABULARY), ids)) == TOKENIZER.decode(ids)


def test_added_tokens_with_odd_characters_decode_as_in_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(FILES["a_image"]))
    tokenizer.add_tokens(["Ġfoo", "a b", "naïve", "ð", "图"])
    tokenizer.add_special_tokens(["Ġsp", "s p"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = read_tokenizer_json(tmp_path / "tokenizer.json")
    added = [
        tokenizer.token_to_id(token) for token in ("Ġfoo", "a b", "naïve", "ð", "图", "Ġsp", "s p")
    ]
    assert (
        vocabulary.token_bytes(added[0]) == b" foo" and vocabulary.token_bytes(added[1]) == b"a b"
    )
    for skip in (True, False):
        found = "".join(
            pieces(IncrementalDecoder(vocabulary, skip_special_tokens=skip), [*added, 65])
        )
        assert found == tokenizer.decode([*added, 65], skip_special_tokens=skip)


def test_a_character_appears_with_its_last_byte_and_not_before() -> None:
    assert pieces(IncrementalDecoder(VOCABULARY), ids_of("é😀a")) == [
        "",
        "é",
        "",
        "",
        "",
        "😀",
        "a",
        "",
    ]


def test_an_answer_cut_inside_a_character_ends_with_one_mark() -> None:
    assert pieces(IncrementalDecoder(VOCABULARY), ids_of("a😀")[:-1]) == ["a", "", "", "", "\ufffd"]


def test_special_tokens_are_shown_only_when_asked_and_others_always() -> None:
    end = TOKENIZER.token_to_id("<|im_end|>")
    call = TOKENIZER.token_to_id("<tool_call>")
    assert (
        VOCABULARY.special_ids
        and end in VOCABULARY.special_ids
        and call not in VOCABULARY.special_ids
    )
    assert IncrementalDecoder(VOCABULARY).push([end, call]) == "<tool_call>"
    assert (
        IncrementalDecoder(VOCABULARY, skip_special_tokens=False).push([end, call])
        == "<|im_end|><tool_call>"
    )


def test_text_before_a_stop_string_comes_out_and_the_completing_token_counts() -> None:
    decoder = IncrementalDecoder(VOCABULARY, ("END",))
    assert decoder.push(ids_of("ab EN")) == "ab "
    assert not decoder.stopped
    assert decoder.push(ids_of("D more")) == ""
    assert decoder.stopped and decoder.num_tokens == 6
    assert decoder.push(ids_of("x")) == decoder.finish() == ""
    assert decoder.num_tokens == 6


def test_text_that_only_began_like_a_stop_string_comes_out_in_full() -> None:
    assert pieces(IncrementalDecoder(VOCABULARY, ("END",)), ids_of("EEN!E")) == [
        "",
        "E",
        "",
        "EN!",
        "",
        "E",
    ]


def test_a_stop_string_may_begin_inside_its_own_false_start() -> None:
    decoder = IncrementalDecoder(VOCABULARY, ("aab",))
    assert decoder.push(ids_of("aaaab")) == "aa" and decoder.stopped


def test_stop_strings_of_more_bytes_than_characters_are_found_at_their_last_byte() -> None:
    decoder = IncrementalDecoder(VOCABULARY, ("é😀",))
    assert decoder.push(ids_of("xé😀")[:-1]) == "x" and not decoder.stopped
    assert decoder.push(ids_of("😀")[-1:]) == "" and decoder.stopped and decoder.num_tokens == 7


def test_of_several_stop_strings_in_one_token_the_earliest_start_wins() -> None:
    token = next(id for id, data in VOCABULARY.bytes_by_id.items() if data == b"<|im_start|>")
    decoder = IncrementalDecoder(VOCABULARY, ("start", "m_", "_st"), skip_special_tokens=False)
    assert decoder.push([token]) == "<|i" and decoder.num_tokens == 1


def test_the_first_stop_string_to_be_complete_ends_the_answer() -> None:
    decoder = IncrementalDecoder(VOCABULARY, ("bcde", "cd"))
    assert decoder.push(ids_of("abcde")) == "ab" and decoder.num_tokens == 4


def test_the_text_after_an_included_stop_string_is_left_out() -> None:
    token = next(id for id, data in VOCABULARY.bytes_by_id.items() if data == b"<|im_start|>")
    decoder = IncrementalDecoder(
        VOCABULARY, ("start", "m_"), skip_special_tokens=False, include_stop=True
    )
    assert decoder.push([token]) == "<|im_" and decoder.finish() == ""


def test_a_stop_string_before_min_tokens_does_not_end_the_answer() -> None:
    decoder = IncrementalDecoder(VOCABULARY, ("ab", "xabz"), min_tokens=4)
    assert decoder.push(ids_of("xab")) == ""
    assert decoder.push(ids_of("q")) == "xabq" and not decoder.stopped
    assert decoder.push(ids_of("rab")) == "r" and decoder.stopped and decoder.num_tokens == 7
    exact = IncrementalDecoder(VOCABULARY, ("ab",), min_tokens=2)
    assert exact.push(ids_of("ab")) == "" and exact.stopped


ab = st.text("ab", min_size=1, max_size=4)


@settings(max_examples=500)
@given(
    st.text("abé", max_size=20),
    st.lists(ab, max_size=3),
    st.lists(st.integers(1, 5), max_size=8),
    st.booleans(),
)
def test_stop_strings_cut_as_a_search_of_the_whole_text_does(
    text: str, stop: list[str], sizes: list[int], include: bool
) -> None:
    ids = ids_of(text)
    want = text
    num_tokens = len(ids_of(text))
    for n in range(1, len(ids) + 1):
        so_far = bytes(b for id in ids[:n] for b in VOCABULARY.token_bytes(id)).decode(
            errors="ignore"
        )
        if starts := [so_far.index(one) for one in stop if one in so_far]:
            want = so_far if include else so_far[: min(starts)]
            num_tokens = n
            break
    decoder = IncrementalDecoder(VOCABULARY, tuple(stop), include_stop=include)
    found = ""
    for size in [*sizes, len(ids)]:
        found += decoder.push(ids[:size])
        ids = ids[size:]
        assert want.startswith(found)
    assert found + decoder.finish() == want
    assert decoder.num_tokens == num_tokens


def test_the_text_that_is_held_back_stays_bounded() -> None:
    decoder = IncrementalDecoder(VOCABULARY, ("a" * 255 + "b",))
    given = ids_of("a")[0]
    found = decoder.push([given] * 10_000)
    assert len(found) == 10_000 - 255
    assert found + decoder.finish() == "a" * 10_000


@pytest.mark.parametrize("case", golden_vocabularies.CASES)
def test_answers_come_out_exactly_from_every_kind_of_vocabulary(case: str) -> None:
    answers = golden_vocabularies.expected(case)["answers"]
    assert len(answers) > 50
    for answer in answers:
        vocabulary = golden_vocabularies.vocabulary(case)
        found = pieces(IncrementalDecoder(vocabulary, skip_special_tokens=False), answer["ids"])
        assert "".join(found) == answer["text"]


def test_only_the_space_at_the_start_of_an_answer_is_the_tokenizers() -> None:
    vocabulary = golden_vocabularies.vocabulary("sentencepiece_bpe_prefix")
    ids = vocabulary.encode("a b")
    assert pieces(IncrementalDecoder(vocabulary), [1, *ids])[:3] == ["", "a", " b"]
    assert "".join(pieces(IncrementalDecoder(vocabulary), [*ids, *ids])) == "a b a b"
    shown = pieces(IncrementalDecoder(vocabulary, skip_special_tokens=False), [1, *ids])
    assert "".join(shown) == "<s> a b"


def test_all_spaces_at_the_start_may_be_the_tokenizers() -> None:
    vocabulary = golden_vocabularies.vocabulary("sentencepiece_bpe_trim")
    space = vocabulary.id_of("\u2581")
    assert space is not None
    ids = [space, space, *vocabulary.encode("a b"), space]
    assert "".join(pieces(IncrementalDecoder(vocabulary), ids)) == "a b "


def test_a_stop_string_is_found_without_the_tokenizers_space() -> None:
    vocabulary = golden_vocabularies.vocabulary("sentencepiece_bpe_prefix")
    decoder = IncrementalDecoder(vocabulary, (" a",))
    assert decoder.push(vocabulary.encode("a a")) == "a" and decoder.stopped


def test_each_byte_of_a_broken_character_is_marked_as_in_sentencepiece() -> None:
    vocabulary = golden_vocabularies.vocabulary("wemm")
    ids = vocabulary.encode("😀")
    assert len(ids) == 4
    assert pieces(IncrementalDecoder(vocabulary), ids) == ["", "", "", "😀", ""]
    cut = pieces(IncrementalDecoder(vocabulary), ids[:3])
    assert cut == ["", "", "", "\ufffd" * 3]
    other = vocabulary.encode("world")[-1:]
    assert "".join(pieces(IncrementalDecoder(vocabulary), [*ids[:2], *other])) == "\ufffd\ufffdd"


def test_a_tokenizer_with_another_decoder_is_refused_by_name(tmp_path: Path) -> None:
    config = json.loads(FILES["a_image"].read_text())
    for decoder, told in (
        ({"type": "WordPiece"}, "decoder 'WordPiece', which is not supported yet"),
        (None, "decoder None"),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(config | {"decoder": decoder}))
        with pytest.raises(BadCheckpoint, match=told):
            read_tokenizer_json(tmp_path / "tokenizer.json")


def test_logprob_entries_have_openais_form() -> None:
    a = ids_of("a")[0]
    half = ids_of("é")[0]
    assert logprob_entry(VOCABULARY, half, -0.5, [(a, -0.25), (half, float("-inf"))]) == {
        "token": "\ufffd",
        "logprob": -0.5,
        "bytes": [0xC3],
        "token_id": half,
        "top_logprobs": [
            {"token": "a", "logprob": -0.25, "bytes": [97], "token_id": a},
            {"token": "\ufffd", "logprob": -9999.0, "bytes": [0xC3], "token_id": half},
        ],
    }
    assert logprob_entry(VOCABULARY, a, -1.0)["top_logprobs"] == []


def test_logprob_entries_name_special_tokens_in_full() -> None:
    assert (
        logprob_entry(VOCABULARY, TOKENIZER.token_to_id("<|im_end|>"), -1.0)["token"]
        == "<|im_end|>"
    )
