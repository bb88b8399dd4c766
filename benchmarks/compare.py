"""Twinlens next to other servers: one checkpoint, one machine, one load, in turn.

    python -m benchmarks.compare --model mid --peer vllm=VENV --peer openvino=VENV,MODEL

In each round every server is started afresh, asked the same questions by `twinlens bench`, and
stopped. The order of the servers turns from round to round. The figures are medians over the
rounds. The ratios are medians of each round's own ratio, because small machines drift. How far the
answers agree is shown as well, because a fast server may compute something else.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import find
from benchmarks.peers import PEERS, ROOT, TWINLENS, Peer, Place
from benchmarks.serving import free_port

START_SECONDS = 900
STOP_SECONDS = 30
POLL_SECONDS = 0.5
FIRST_SEED = 100
CHECKPOINTS = Path.home() / ".cache" / "twinlens" / "checkpoints"
FIGURES = {
    "output_tokens_per_second": "output tokens/s",
    "ttft_p50_seconds": "TTFT p50",
    "ttft_p95_seconds": "TTFT p95",
    "tpot_p50_seconds": "TPOT p50",
}
"""The figures of `twinlens bench` that are compared, and their headings."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One load. Clients ask again as soon as they have an answer."""

    name: str
    concurrency: int
    requests: int
    image: str = ""
    same: float = 0.0
    """The share of requests that show an image which was shown before."""
    max_tokens: int = 64

    def arguments(self) -> list[str]:
        return [
            *("--concurrency", str(self.concurrency), "--requests", str(self.requests)),
            *(("--image", self.image) if self.image else ("--images", "0")),
            *("--same", str(self.same), "--max-tokens", str(self.max_tokens)),
        ]


CELLS = {
    cell.name: cell
    for cell in (
        Cell(name="img448-c1", concurrency=1, requests=4, image="448x448"),
        Cell(name="img448-c4", concurrency=4, requests=12, image="448x448"),
        Cell(name="img448-c16", concurrency=16, requests=32, image="448x448"),
        Cell(name="img1288-c1", concurrency=1, requests=3, image="1288x728"),
        Cell(name="img1288-c4", concurrency=4, requests=8, image="1288x728"),
        Cell(name="text-c1", concurrency=1, requests=3, max_tokens=128),
        Cell(name="text-c16", concurrency=16, requests=32, max_tokens=128),
        Cell(name="same448-c4", concurrency=4, requests=12, image="448x448", same=1.0),
    )
}


@dataclass(frozen=True)
class Server:
    """A server that takes part, with where it is and what it serves."""

    peer: Peer
    folder: Path
    model: str


@dataclass(frozen=True)
class Run:
    """What one server did in one cell of one round."""

    figures: dict[str, Any]
    texts: list[str]
    """The answers, in the order of the requests."""


Runs = dict[tuple[str, str, int], Run]
"""By server, cell and round."""


def main() -> None:
    arguments = parse_arguments()
    model = find(arguments.model, CHECKPOINTS)
    servers = [Server(TWINLENS, ROOT, model)]
    servers += [read_peer(text, model) for text in arguments.peer]
    cells = [CELLS[name] for name in arguments.cells.split(",")]
    runs: Runs = {}
    for turn in range(arguments.rounds):
        for server in turned(servers, turn):
            for cell, run in measure(server, cells, turn, arguments):
                runs[server.peer.name, cell.name, turn] = run
    figures = summarise(runs, [server.peer.name for server in servers], cells)
    print(table(figures))
    print(json.dumps({"threads": arguments.threads, "rounds": arguments.rounds, "cells": figures}))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="mid", help="a known checkpoint or a model directory")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=FOLDER[,MODEL]",
        help=f"a server to compare with ({', '.join(PEERS)}): its virtual environment, and the "
        "model in its own form if it needs one",
    )
    parser.add_argument(
        "--cells", default="img448-c1,img448-c4,img1288-c1,text-c1,same448-c4", help="which loads"
    )
    parser.add_argument("--rounds", type=int, default=3, help="fresh starts of each server")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="cores that each server may use"
    )
    return parser.parse_args()


def read_peer(text: str, model: str) -> Server:
    """Return the server that `NAME=FOLDER[,MODEL]` names."""
    name, _, rest = text.partition("=")
    folder, _, own_model = rest.partition(",")
    if name not in PEERS or not Path(folder).is_dir():
        sys.exit(f"--peer {text}: write NAME=FOLDER[,MODEL]; NAME is one of {', '.join(PEERS)}")
    return Server(PEERS[name], Path(folder).resolve(), own_model or model)


def turned(servers: Sequence[Server], turn: int) -> list[Server]:
    """Return the servers in the order of this round, so that none is always the first."""
    start = turn % len(servers)
    return [*servers[start:], *servers[:start]]


def measure(
    server: Server, cells: Iterable[Cell], turn: int, arguments: argparse.Namespace
) -> Iterator[tuple[Cell, Run]]:
    """Start the server and yield what it does in each cell."""
    place = Place(
        folder=server.folder, model=server.model, port=free_port(), threads=arguments.threads
    )
    with running(server.peer, place) as url:
        for number, cell in enumerate(cells):
            print(f"round {turn}: {server.peer.name}, {cell.name}", file=sys.stderr)
            # Each cell has images of its own, since caches would answer for those of another one.
            # Every server gets the same ones.
            seed = FIRST_SEED + 100 * turn + number
            yield cell, bench(url, cell, seed)


@contextmanager
def running(peer: Peer, place: Place) -> Iterator[str]:
    """Run a server and yield its URL. It stops at the end of the block, with its processes."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            peer.command(place),
            env=peer.variables(place),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{place.port}"
            if not answers(url + peer.ready_path, process):
                log.seek(0)
                sys.exit(f"{peer.name} did not start:\n{log.read()[-2000:]}")
            yield f"{url}/v1"
        finally:
            stop(process)


def answers(url: str, process: subprocess.Popen[bytes]) -> bool:
    """Wait until the server answers. Return whether it does."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return True
        except OSError:
            time.sleep(POLL_SECONDS)
    return False


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and all processes that it started."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(STOP_SECONDS)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def bench(url: str, cell: Cell, seed: int) -> Run:
    """Load the server with a cell and return what came of it.

    The program ends if a request fails, because figures of failed requests mean nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "services.cli", "bench", "--url", url),
            *cell.arguments(),
            *("--seed", str(seed), "--out", folder),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        if done.returncode:
            sys.exit(f"the load of {cell.name} failed")
        figures = json.loads(done.stdout.splitlines()[-1])
        lines = (Path(folder) / "requests.jsonl").read_text().splitlines()
    if figures["failed_requests"]:
        sys.exit(f"{figures['failed']} requests of {cell.name} failed")
    requests = sorted(map(json.loads, lines), key=lambda request: request["sent_seconds"])
    return Run(figures, [request["text"] for request in requests])


def summarise(runs: Runs, names: Sequence[str], cells: Iterable[Cell]) -> dict[str, Any]:
    """Return the figures by cell and server; those of the peers have ratios and agreement, too."""
    rounds = sorted({turn for _, _, turn in runs})
    found: dict[str, Any] = {}
    for cell in cells:
        own = [runs[TWINLENS.name, cell.name, turn] for turn in rounds]
        found[cell.name] = {TWINLENS.name: medians(own)}
        for name in names[1:]:
            theirs = [runs[name, cell.name, turn] for turn in rounds]
            found[cell.name][name] = medians(theirs) | {
                "ratios": ratios(own, theirs),
                "agreement": agreement(own, theirs),
            }
    return found


def medians(runs: Sequence[Run]) -> dict[str, float]:
    return {key: statistics.median(run.figures[key] for run in runs) for key in FIGURES}


def ratios(own: Sequence[Run], theirs: Sequence[Run]) -> dict[str, float]:
    """Return the median over the rounds of Twinlens' figure divided by the peer's."""
    return {
        key: statistics.median(
            mine.figures[key] / other.figures[key] for mine, other in zip(own, theirs, strict=True)
        )
        for key in FIGURES
    }


def agreement(own: Sequence[Run], theirs: Sequence[Run]) -> dict[str, float]:
    """Return how far the answers agree.

    `equal` is the share of answers that are equal in full, and `leading` the median share of an
    answer's words before the first difference.
    """
    pairs = [
        (mine, other)
        for one, two in zip(own, theirs, strict=True)
        for mine, other in zip(one.texts, two.texts, strict=True)
    ]
    return {
        "equal": statistics.mean(mine == other for mine, other in pairs),
        "leading": statistics.median(leading_share(mine, other) for mine, other in pairs),
    }


def leading_share(one: str, other: str) -> float:
    """Return the share of the longer text's words that come before the first difference."""
    first = one.split()
    second = other.split()
    same = 0
    for mine, theirs in zip(first, second, strict=False):
        if mine != theirs:
            break
        same += 1
    return same / max(len(first), len(second), 1)


def table(figures: dict[str, Any]) -> str:
    """Return the figures as a Markdown table: one row for each cell and server."""
    heads = ["cell", "server", *FIGURES.values(), "ratio tokens/s", "ratio TTFT p50", "agreement"]
    rows = [heads, ["---"] * len(heads)]
    for cell, servers in figures.items():
        for name, server in servers.items():
            row = [cell, name, *(f"{server[key]:.3g}" for key in FIGURES)]
            if "ratios" in server:
                row += [
                    f"{server['ratios']['output_tokens_per_second']:.2f}x",
                    f"{server['ratios']['ttft_p50_seconds']:.2f}x",
                    f"{server['agreement']['leading']:.0%} leading, "
                    f"{server['agreement']['equal']:.0%} equal",
                ]
            rows.append(row + [""] * (len(heads) - len(row)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
