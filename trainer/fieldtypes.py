"""The types of a configuration's fields: whether a value has one, how a text spells one, how one is called in words.

The decision that shaped it: annotations of a dataclass are enough to check, read and explain its fields, as long as
they are of few kinds: bool, int, float, str, None, Literal, a union with None, tuples of such and tuples of pairs. Left
out: ranges and what fields mean (recipe.py).
"""

import sys
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, else the hint alone."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def has_type(value: object, hint: Any) -> bool:
    """Whether the value is of exactly this type; for float an int will do, infinities and NaN will not."""
    if len(_options(hint)) > 1:
        return any(has_type(value, option) for option in _options(hint))
    if get_origin(hint) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if get_origin(hint) is tuple:
        items = get_args(hint)
        if not isinstance(value, tuple):
            return False
        if items[-1] is Ellipsis:
            return all(has_type(item, items[0]) for item in value)
        return len(value) == len(items) and all(map(has_type, value, items))
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]
    return type(value) is hint  # so that True is no int


def parse(text: str, hint: Any) -> Any:
    """The value of this type that the text spells, or something that `has_type` refuses. Raises ValueError."""
    options = _options(hint)
    if NoneType in options:
        return None if text.lower() == "none" else parse(text, options[0])
    if get_origin(hint) is Literal:
        return next((choice for choice in get_args(hint) if str(choice) == text), text)
    if get_origin(hint) is tuple:
        items = get_args(hint)
        if items[-1] is Ellipsis:
            return () if text.lower() in ("", "none") else tuple(parse(item, items[0]) for item in text.split(","))
        return tuple(parse(item, kind) for item, kind in zip(text.split(":"), items, strict=True))
    if hint is bool:
        return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(text.lower(), text)
    return hint(text)


def describe(hint: Any) -> str:
    """What a field takes, in words."""
    if len(_options(hint)) > 1:
        return " or ".join(describe(option) for option in _options(hint))
    if get_origin(hint) is Literal:
        return " or ".join(str(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        pairs = get_origin(get_args(hint)[0]) is tuple
        return "epoch:rate pairs with commas between" if pairs else "whole numbers with commas between"
    names = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a name", NoneType: "none"}
    return names[hint]


def listed(value: Any) -> Any:
    """Tuples as lists, at any depth: what JSON gives back."""
    return [listed(item) for item in value] if isinstance(value, tuple) else value


def tupled(value: Any) -> Any:
    """The inverse of `listed`."""
    return tuple(tupled(item) for item in value) if isinstance(value, list) else value
