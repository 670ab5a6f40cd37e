"""The one exception that is meant for a person.

Anything a user can cause and mend is a `UserError` whose message is one line: what, got, expected, remedy. Commands
print that line and exit with status 1; every other exception is a defect of the project. Deliberately no hierarchy:
nobody catches one kind of user error and not another.
"""


class UserError(Exception):
    """A fault in input, configuration or environment, told in one line with its remedy."""
