"""The one exception that is meant for a person: one line with what, got, expected, remedy.

Messages quote files, and what a file holds must not steer the terminal that shows it: they are escaped here, for all.
"""


class UserError(Exception):
    """A fault in input, configuration or environment, told in one line with its remedy."""

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: object) -> str:
    """Text for a screen or a line: control characters and what is not Unicode as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
