"""The commands: every one has its help, and the flags that scripts and manifests rely on are
frozen."""

import argparse
import os
import re
import subprocess
import sys

import pytest

from common.config import add_arguments
from common.settings import SERVICES
from tests.policy.sources import ROOT

SERVE = """
--attention --autoscale --block-size --cors-origins
--detokenizer --device --dtype --embedding-cache-mib --embeddings
--grpc-port --help --image-formats
--host --http-port --known-as --kv-memory --log-format --log-level --llm --max-body-mib
--lora --lora-root --max-lora-rank --max-loras
 --max-connections --max-connections-per-client --max-frames --max-held-body-mib --max-model-len
--max-num-batched-tokens --max-num-seqs --max-pixels --max-waiting --metric-aliases --min-pixels
--model --no-metric-aliases --no-ui --otlp-traces-endpoint --preprocess
--quantization --read --record --record-mib --request-timeout --served-model-name
--simulate-vision-ms --threads --tp --ui
--video-fps --vision --vision-artefact --vision-standby --vision-buckets --oversized-images
"""
GENERATE = """
--draw --fps --grpc --help --ignore-eos --image --json --max-tokens --seed --stop --temperature
--timeout --top-k --top-p --video
"""
PLAN = """
--card-gib --concurrency --dtype --group-rate --grpc --help --image --images-per-request
--max-model-len --max-tokens --model --vision-seconds
"""
COMPILE = "--buckets --column-chunks --dtype --help --model --no-column-chunks --out"
BENCH = """
--concurrency --grpc --help --image --image-format --images --max-tokens --model --out
--prompt-words --rate --requests --same --seed --slo --timeout --url --warmup
"""
VERIFY = """
--dtype --help --image --json --max-pixels --max-tokens --min-pixels --model --served-model-name
--tolerance --url
"""
STATUS = "--grpc --help --json"
REPLAY = """
--allow-differences --concurrency --grpc --help --json --list --model --out --requests --speed --url
"""

EVAL = """
--answers --concurrency --data --help --limit --max-tokens --model --out --prompt --restart --seed
--temperature --url
"""


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    own = {key: value for key, value in os.environ.items() if not key.startswith("TWINLENS_")}
    environment = own | {"COLUMNS": "200"} | variables
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def flags_in(text: str) -> set[str]:
    """The flags that a help text lists; flags named in a sentence do not count."""
    return {
        flag
        for line in text.splitlines()
        for flag in re.findall(r"(?:^  (?:-\w, )?|, )(--[a-z0-9-]+)", line)
    }


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("serve", SERVE),
        ("extract-embeddings", "--help --model --out"),
        ("shard", "--help --model --out --tp"),
        ("generate", GENERATE),
        ("status", STATUS),
        ("top", "--grpc --help --interval --url"),
        ("bench", BENCH),
        ("plan", PLAN),
        ("compile", COMPILE),
        ("verify", VERIFY),
        ("scale", STATUS),
        ("drain", STATUS),
        ("replay", REPLAY),
        ("eval cer", EVAL + "--exact-whitespace --ignore-case --ignore-punctuation"),
        ("eval clip-score", EVAL + "--clip --open-clip --strip-markup"),
        ("eval mmbench", EVAL),
        ("eval mmmu", EVAL + "--split"),
        ("eval ocrbench", EVAL + "--images"),
        ("eval olmocr-bench", EVAL + "--katex --longest-side --repeats"),
        ("eval textvqa", EVAL + "--images"),
        ("eval vqav2", EVAL + "--annotations --images --labels"),
    ],
)
def test_the_flags_of_a_command_are_these(command: str, flags: str) -> None:
    """A new flag needs a line here: is there no default that would do?"""
    shown = run("services.cli", *command.split(), "--help")
    assert shown.returncode == 0
    assert flags_in(shown.stdout) == set(flags.split())


@pytest.mark.parametrize("role", SERVICES)
def test_each_service_alone_tells_its_flags_and_variables(role: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(SERVICES[role], parser)
    told = {
        flag: action.dest
        for action in parser._actions
        if action.help != argparse.SUPPRESS
        for flag in action.option_strings
        if flag != "-h"
    }
    shown = run(f"services.{role}", "--help")
    assert shown.returncode == 0 and not shown.stderr
    assert flags_in(shown.stdout) == set(told)
    assert set(re.findall(r"\[(TWINLENS_\w+)\]", shown.stdout)) == {
        f"TWINLENS_{name.upper()}" for name in told.values() if name != "help"
    }


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nothing",),
        ("serve", "--nothing"),
        ("serve", "--vis", "1"),
        ("status", "extra"),
        ("generate",),
    ],
    ids=str,
)
def test_wrong_use_ends_with_status_2_and_says_nothing_on_stdout(
    arguments: tuple[str, ...],
) -> None:
    done = run("services.cli", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: twinlens" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [("services.cli", "status"), ("services.cli", "serve"), ("services.controller",)],
    ids=" ".join,
)
def test_a_variable_that_nobody_knows_is_refused_by_every_command(
    arguments: tuple[str, ...],
) -> None:
    done = run(*arguments, TWINLENS_NONSENSE="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "TWINLENS_NONSENSE" in done.stderr
