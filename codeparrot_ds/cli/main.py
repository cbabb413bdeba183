"""The command line: ``codeparrot-ds COMMAND``. Each command imports its work when it runs, so that help is instant."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence

from codeparrot_ds.cli.check import add_check, add_plan
from codeparrot_ds.cli.common import PROGRAM
from codeparrot_ds.cli.compare import add_compare
from codeparrot_ds.cli.completion import add_completion
from codeparrot_ds.cli.data import add_corpus, add_data, add_tokenizer
from codeparrot_ds.cli.evaluate import add_complete, add_evaluate, add_humaneval
from codeparrot_ds.cli.runs import add_checkpoint, add_hub, add_report, add_runs
from codeparrot_ds.cli.train import add_demo, add_doctor, add_train
from codeparrot_ds.config.arguments import ArgumentParser, HelpFormatter
from codeparrot_ds.errors import UserError
from codeparrot_ds.secret_forms import hide_secrets, hide_secrets_in_tracebacks
from codeparrot_ds.shell import TerminatedError
from codeparrot_ds.version import __version__

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
TERMINATED = 143  # 128 + SIGTERM
BROKEN_PIPE = 141  # 128 + SIGPIPE
# What the user can fix when the operating system refuses; anything else is a fault of ours and keeps its traceback.
REFUSALS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code (0 done, 1 found something wrong, 2 a mistake of the user's)."""
    if argv is None:
        hide_secrets_in_tracebacks()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = build_parser()
        if not arguments:
            parser.print_help()
            return 0
        parsed = parser.parse_args(arguments)
        parsed.arguments = arguments[1:]
        code = parsed.run(parsed)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return TERMINATED if isinstance(interrupt, TerminatedError) else INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe has left (`| head`); the interpreter's own flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        where = f": {hide_secrets(str(error.filename))}" if error.filename else ""
        print(f"{PROGRAM}: error: {REFUSALS[error.errno]}{where}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # it was the output: the interpreter's own flush at exit must not complain once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UserError.exit_code


WHERE_TO_START = """\
where to start:
  codeparrot-ds demo                       the whole story in minutes
then with code of yours:
  codeparrot-ds corpus ~/src/project --out corpus
  codeparrot-ds tokenizer --data corpus --out tokenizer
  codeparrot-ds train small --data corpus --tokenizer tokenizer
"""


class _AsWritten(argparse.RawDescriptionHelpFormatter, HelpFormatter):
    """Keeps the lines of a parser's epilog."""


def build_parser() -> ArgumentParser:
    """The parser of all commands."""
    parser = ArgumentParser(
        prog=PROGRAM,
        description="Trains code models from scratch with DeepSpeed.",
        epilog=WHERE_TO_START,
        formatter_class=_AsWritten,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (
        add_demo,
        add_corpus,
        add_tokenizer,
        add_data,
        add_train,
        add_doctor,
        add_evaluate,
        add_complete,
        add_humaneval,
        add_check,
        add_plan,
        add_compare,
        add_runs,
        add_checkpoint,
        add_hub,
        add_report,
        add_completion,
    ):
        add(commands)
    return parser
