"""The one exception that a user's mistake raises."""


class UserError(Exception):
    """Something that the user can mend: one clear sentence with the file, line or key, and the nearest valid choice.

    The command line prints the sentence without a traceback and exits with ``exit_code``.
    """

    exit_code = 2
