"""The one exception that a user's mistake raises, and what a library's exception says in one line."""


class UserError(Exception):
    """Something that the user can fix: one clear sentence with the file, line or key, and the nearest valid choice.

    The command line prints the sentence without a traceback and exits with ``exit_code``.
    """

    exit_code = 2


def first_line(error: BaseException) -> str:
    """What an exception says, without the paragraphs that some libraries add; its type where it says nothing."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)
