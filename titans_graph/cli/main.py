"""``main``: from arguments to a command, and from its end to an exit status.

0 sound, 1 a failed check or run, 2 bad usage; 130 and 143 after Ctrl-C and SIGTERM, 141 where the reader of the output
went away.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from titans_graph import __version__
from titans_graph.cli import benching, doctor, inspecting, running
from titans_graph.cli.blame import rendered
from titans_graph.errors import SpecError, TitansGraphError, UsageError

EXTRA = ("accelerate", "matplotlib", "numpy", "tensorboard", "tqdm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``titans-graph`` with ``arguments`` (default: the process's) and return its exit status."""
    try:
        options = parser().parse_args(arguments)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 2
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python complains when it flushes at its end
        return 141
    except UsageError as error:
        return _fail(str(error), 2)
    except SpecError as error:
        return _fail(rendered(error.diagnostics, getattr(options, "spec", ""), getattr(options, "set", [])), 1)
    except TitansGraphError as error:
        return _fail(str(error), 1)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error), 1)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        return _fail(f"{error.name} is not installed\n  help: pip install 'titans-graph[train]'", 1)
    return status


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(
        prog="titans-graph",
        description="Memory-augmented sequence models, declared as graphs, checked, compiled and trained.",
        epilog="example:\n  titans-graph demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"titans-graph {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    inspecting.add_commands(commands)
    doctor.add_commands(commands)
    running.add_commands(commands)
    benching.add_commands(commands)
    return top


def _fail(message: str, status: int) -> int:
    if not message.lstrip().startswith("error") and ": error: " not in message:
        message = f"error: {message}"
    print(message, file=sys.stderr)
    return status
