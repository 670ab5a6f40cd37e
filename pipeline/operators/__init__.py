"""stub until merged"""


def load_operators() -> bool:
    return False
