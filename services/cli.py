"""The command `twinlens` with its subcommands."""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from common.config import BadSetting, add_arguments, from_namespace, set_environment_defaults
from common.process import EXIT_FAILED, EXIT_INTERRUPTED, write_utf8
from common.settings import (
    COMMANDS,
    KNOWN_NAMES,
    CompileSettings,
    ExtractSettings,
    PlanSettings,
    ServeSettings,
    ShardSettings,
)
from services.commands import control, convert, generate, top
from services.commands.bench import command as bench
from services.commands.compile import compile_model
from services.commands.evaluation import command as evaluation
from services.commands.replay import command as replay
from services.commands.verification import command as verification


@dataclass(frozen=True)
class Command:
    """A command with flags of its own. Those whose flags are settings are in `COMMANDS`.

    Every command's flags are known whenever one runs, so the modules named here import what is
    slow to import inside their functions.
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    """Does the work and returns the exit status."""


OTHER_COMMANDS = (
    Command(
        "generate",
        "ask a running system over gRPC, and stream the answer to stdout",
        generate.add_generate_arguments,
        generate.generate,
    ),
    Command(
        "status",
        "list the members of a running system and their load",
        control.add_status_arguments,
        control.status,
    ),
    Command(
        "top",
        "show a running system's stages and members live",
        top.add_top_arguments,
        top.top,
    ),
    Command(
        "scale",
        "change how many replicas of a role run",
        control.add_scale_arguments,
        control.scale,
    ),
    Command(
        "drain",
        "let one member finish what it holds and leave",
        control.add_drain_arguments,
        control.drain,
    ),
    Command(
        "bench",
        "measure how fast a server answers, at rising concurrency or at a rate",
        bench.add_bench_arguments,
        bench.bench,
    ),
    Command(
        "convert",
        "write a copy of a model with other names of its tensors",
        convert.add_convert_arguments,
        convert.convert,
    ),
    Command(
        "eval",
        "ask a system the questions of a benchmark and score its answers",
        evaluation.add_arguments,
        evaluation.evaluate,
    ),
    Command(
        "replay",
        "send recorded requests again, and compare answers and times",
        replay.add_arguments,
        replay.run,
    ),
    Command(
        "verify",
        "compare what a running system computes with the model's reference implementation",
        verification.add_arguments,
        verification.verify,
    ),
)
SETTINGS_HELP = {
    "serve": "start every service on this machine and keep it running",
    "plan": "show a model's memory and the vision replicas per language group",
    "compile": "compile a model's vision tower for fixed patch counts",
    "extract-embeddings": "write a model's token embeddings to a file of their own",
    "shard": "write a model's weights as a file for each tensor-parallel rank",
}
"""The help of each of the `COMMANDS`."""


def main() -> None:
    write_utf8()
    try:
        sys.exit(run(make_parser().parse_args()))
    except BrokenPipeError:
        # The reader of our output has closed it. Python flushes stdout again at exit, which must
        # not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands, with defaults from the TWINLENS_* variables."""
    parser = argparse.ArgumentParser(
        "twinlens",
        description="Serve vision-language models with vision and language in separate processes.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help, allow_abbrev=False)

    for name, settings in COMMANDS.items():
        add_arguments(settings, add(name, SETTINGS_HELP[name]))
    for other in OTHER_COMMANDS:
        other.add_arguments(add(other.name, other.help))
    for command in commands.choices.values():
        try:
            set_environment_defaults(command, os.environ, KNOWN_NAMES)
        except BadSetting as e:
            parser.error(str(e))
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen command and return the exit status.

    `serve` and what reads models are imported here, because the others should start quickly.
    """
    match arguments.command:
        case "serve":
            from services.launcher.launcher import serve

            return serve(from_namespace(ServeSettings, arguments))
        case "plan":
            from services.commands.plan import plan

            return plan(from_namespace(PlanSettings, arguments))
        case "compile":
            return compile_model(from_namespace(CompileSettings, arguments))
        case "shard":
            from services.commands.shard import shard

            return shard(from_namespace(ShardSettings, arguments))
        case "extract-embeddings":
            from services.commands.extract import extract

            return extract(from_namespace(ExtractSettings, arguments))
        case name:
            return next(other for other in OTHER_COMMANDS if other.name == name).run(arguments)


if __name__ == "__main__":
    main()
