"""The comparison with other servers: its order, its ratios, and how it judges agreement."""

from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.compare import Cell, Run, Server
from benchmarks.peers import PEERS, TWINLENS, Peer, Place


def run_of(tokens_per_second: float, *texts: str) -> Run:
    figures = dict.fromkeys(compare.FIGURES, 1.0)
    return Run(figures | {"output_tokens_per_second": tokens_per_second}, list(texts))


def test_no_server_is_always_the_first() -> None:
    servers = [Server(peer, Path(), "") for peer in (TWINLENS, *PEERS.values())]
    firsts = [compare.turned(servers, turn)[0].peer.name for turn in range(len(servers))]
    assert sorted(firsts) == sorted(["twinlens", *PEERS])


def test_ratios_are_medians_of_each_rounds_own() -> None:
    """The machine was twice as fast in the second round, which changes no ratio."""
    cell = Cell(name="text", concurrency=1, requests=1)
    runs = {
        ("twinlens", "text", 0): run_of(30, "a"),
        ("twinlens", "text", 1): run_of(60, "a"),
        ("vllm", "text", 0): run_of(20, "a"),
        ("vllm", "text", 1): run_of(40, "a"),
    }
    figures = compare.summarise(runs, ["twinlens", "vllm"], [cell])["text"]
    assert figures["twinlens"]["output_tokens_per_second"] == 45
    assert figures["vllm"]["ratios"]["output_tokens_per_second"] == 1.5
    assert "| text | vllm | 30 | 1 | 1 | 1 | 1.50x | 1.00x |" in compare.table({"text": figures})


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [
        ("a b c d", "a b c d", 1.0),
        ("a b c d", "a b x d", 0.5),
        ("a b", "a b c d", 0.5),
        ("", "", 0.0),
        ("x", "y", 0.0),
    ],
)
def test_leading_share(one: str, other: str, share: float) -> None:
    assert compare.leading_share(one, other) == share


def test_agreement_counts_equal_answers() -> None:
    found = compare.agreement([run_of(1, "a b", "c d")], [run_of(1, "a b", "c x")])
    assert found == {"equal": 0.5, "leading": 0.75}


def test_a_peer_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="NAME is one of vllm"):
        compare.read_peer(f"unknown={tmp_path}", "mid")
    server = compare.read_peer(f"openvino={tmp_path},exported", "mid")
    assert server.model == "exported"
    assert compare.read_peer(f"vllm={tmp_path}", "mid").model == "mid"


@pytest.mark.parametrize("peer", [TWINLENS, *PEERS.values()], ids=lambda peer: peer.name)
def test_every_server_gets_its_model_and_port(peer: Peer, tmp_path: Path) -> None:
    place = Place(folder=tmp_path, model="/models/m", port=1234, threads=2)
    command = " ".join(peer.command(place))
    assert "/models/m" in command
    assert "1234" in command
    assert peer.variables(place)["OMP_NUM_THREADS"] == "2"
