"""``python -m fastconv COMMAND``: each command is a module with ``add_arguments`` and ``run``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "demo": "networks on real photographs and digits, reference against fastconv",
    "info": "versions, what was built for what, which backends can run here",
    "explain": "what swapping a model would change, and why not the rest",
    "qualify": "proves and times the kernels on this machine, and has auto use what won",
    "verify": "errors of every op beside torch's own, against float64",
    "bench": "time of whole networks, eager against fastconv; of single layers: pytest benchmarks",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; only that command's module is imported."""
    parser = argparse.ArgumentParser(
        prog="python -m fastconv",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(["commands:", *(f"  {name:<9} {text}" for name, text in COMMANDS.items())]),
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="see COMMAND --help")
    selected = parser.parse_args(argv)

    command = import_module(f"fastconv.commands.{selected.command}")
    parser = argparse.ArgumentParser(prog=f"{parser.prog} {selected.command}", description=COMMANDS[selected.command])
    command.add_arguments(parser)
    return command.run(parser.parse_args(selected.arguments))


if __name__ == "__main__":
    sys.exit(main())
