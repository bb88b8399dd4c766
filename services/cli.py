"""The command `twinlens`: serve, generate, status, scale, drain."""

import argparse
import os
import sys

from common.config import BadSetting, add_arguments, from_namespace, set_environment_defaults
from common.settings import KNOWN_NAMES, PlanSettings, ServeSettings
from services.commands.control import (
    add_drain_arguments,
    add_scale_arguments,
    add_status_arguments,
    drain,
    scale,
    status,
)
from services.commands.generate import add_generate_arguments, generate

EXIT_INTERRUPTED = 130


def main() -> None:
    parser = argparse.ArgumentParser(
        "twinlens",
        description="Serves vision-language models with vision and language as separate processes.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help, allow_abbrev=False)

    add_arguments(
        ServeSettings, add("serve", "start every service on this machine and keep them running")
    )
    add_generate_arguments(
        add("generate", "ask a running system over gRPC; the answer streams to stdout")
    )
    add_status_arguments(add("status", "who is a member of a running system, and how busy"))
    add_scale_arguments(add("scale", "change how many replicas of a role run"))
    add_drain_arguments(add("drain", "take one member out, once it has finished what it holds"))
    add_arguments(
        PlanSettings,
        add(
            "plan",
            "what a model takes of memory, and how many vision replicas keep a language group busy",
        ),
    )
    for command in commands.choices.values():
        try:
            set_environment_defaults(command, os.environ, KNOWN_NAMES)
        except BadSetting as e:
            parser.error(str(e))
    try:
        sys.exit(run(parser.parse_args()))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def run(arguments: argparse.Namespace) -> int:
    match arguments.command:
        case "serve":
            from services.launcher.launcher import serve

            return serve(from_namespace(ServeSettings, arguments))
        case "plan":
            from services.commands.plan import plan

            return plan(from_namespace(PlanSettings, arguments))
        case "generate":
            return generate(arguments)
        case "scale":
            return scale(arguments)
        case "drain":
            return drain(arguments)
        case _:
            return status(arguments)


if __name__ == "__main__":
    main()
