"""The one exception that a user's mistake raises, and what a library's exception says in one line."""

from __future__ import annotations

from codeparrot_ds.secret_forms import hide_secrets


class UserError(Exception):
    """Something that the user can fix: one clear sentence with the file, line or key, and the nearest valid choice.

    The command line prints the sentence without a traceback and exits with ``exit_code``. Secrets in it are hidden: it
    often repeats what was typed, which may be a URL with a token, and it goes to logs and records.
    """

    exit_code = 2

    def __init__(self, message: str = "") -> None:
        super().__init__(hide_secrets(message))


def first_line(error: BaseException) -> str:
    """What an exception says, without the paragraphs that some libraries add; its type where it says nothing."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)
