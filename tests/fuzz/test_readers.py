"""Every reader of bytes from outside, with broken ones: read, or refused in one line, and nothing else.

Short: run.py does the same for minutes. JSON is broken by its values as well as by its bytes.
"""

import json
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.mutants import mutate
from tests.fuzz.run import NAMES, make_inputs
from tests.fuzz.targets import make_targets

pytest.importorskip("pyarrow")
SHORT = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS | st.sampled_from([10**400, 2**63, -1, "../../etc/passwd", "train-000000.tar\0", "\ud800", "a\nb"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    return make_targets(*make_inputs(folder), folder)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("image") or name == "mean_image"])
def test_a_sound_file_is_read_and_broken_ones_are_read_or_refused(targets, name):
    target = targets[name]
    assert target.read(target.seeds[0]) or name == "checkpoint"  # a whole net is not what this one is

    @SHORT
    @given(st.integers(0, 2**64))
    def try_mutant(number: int) -> None:
        target.read(mutate(target.seeds[0], target.seeds, random.Random(number)))

    try_mutant()


def replace_somewhere(value: Any, path: list[int], new: Any) -> Any:
    """`value` with what lies behind `path` (places in turn, modulo the number there are) replaced, or dropped."""
    if not path or not isinstance(value, list | dict) or not value:
        return new
    if isinstance(value, list):
        place = path[0] % len(value)
        return [*value[:place], replace_somewhere(value[place], path[1:], new), *value[place + 1 :]]
    key = list(value)[path[0] % len(value)]
    if new == "drop" and len(path) == 1:
        return {name: inner for name, inner in value.items() if name != key}
    return {**value, key: replace_somewhere(value[key], path[1:], new)}


@pytest.mark.parametrize("name", ["manifest", "colors"])
def test_json_with_any_value_anywhere_is_read_or_refused(targets, name):
    target = targets[name]
    sound = json.loads(target.seeds[0])

    @settings(SHORT, max_examples=100)
    @given(st.lists(st.integers(0, 50), min_size=1, max_size=3), VALUES | st.just("drop"))
    def try_value(path: list[int], new: Any) -> None:
        target.read(json.dumps(replace_somewhere(sound, path, new)).encode("utf-8", "surrogatepass"))

    try_value()


def list_paths(value: Any) -> list[list[int]]:
    """Where everything lies in JSON, as replace_somewhere takes it."""
    inner = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else []
    return [[]] + [[place, *path] for place, one in enumerate(inner) for path in list_paths(one)]


@pytest.mark.parametrize("name", ["manifest", "colors"])
def test_json_with_a_trap_in_each_of_its_places_is_read_or_refused(targets, name):
    sound = json.loads(targets[name].seeds[0])
    traps = (float("inf"), float("nan"), 10**400, -1, None, "a\nb\x1b[2J", {}, [[]], "\ud800", True, "drop")
    num_refused = 0
    for path in list_paths(sound):
        for trap in traps:
            num_refused += not targets[name].read(json.dumps(replace_somewhere(sound, path, trap)).encode())
    assert num_refused > 100


@pytest.mark.parametrize("text", ["[" * 100_000, '{"schema": 1' + "0" * 5000 + "}", "\ufeff{}", "", "null", '"a"'])
def test_json_that_is_a_trap_is_refused(targets, text):
    for name in ("manifest", "colors"):
        assert not targets[name].read(text.encode())
