"""Recipes: the constants of paper and source, command-line overrides, and the way into config.json and back."""

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.common.errors import UserError
from trainer.recipe import RECIPES, Recipe, from_dict, override, to_dict

PAPER, ORIGINAL = RECIPES["paper"], RECIPES["original"]


def test_paper_has_the_papers_constants() -> None:
    assert to_dict(PAPER) == {
        "name": "paper",
        "mean": "image",
        "unit_variance": False,
        "crop": True,
        "flip": True,
        "lighting": "paper",
        "lighting_off_epoch": None,
        "width": 1.0,
        "maps": [96, 256, 384, 384, 256],
        "num_towers": 2,
        "conv1_pad": "end",
        "activation": "relu",
        "lrn": True,
        "lrn_k": 2.0,
        "lrn_n": 5,
        "lrn_alpha": 1e-4,
        "lrn_beta": 0.75,
        "lrn_alpha_over_n": False,
        "lrn_across_towers": False,
        "spatial_norm": False,
        "conv1_order": "relu-lrn-pool",
        "overlapping_pool": True,
        "dropout": 0.5,
        "dropout_at": "outputs",
        "init": "paper",
        "hidden_bias": 1.0,
        "global_batch_size": 128,
        "epochs": 90,
        "momentum": 0.9,
        "weight_decay": 0.0005,
        "bias_decay": None,
        "lr": 0.01,
        "bias_lr": None,
        "schedule": "plateau",
        "plateau_cuts": 3,
        "plateau_patience": 5,
        "plateau_min_drop": 0.1,
        "lr_milestones": [],
        "conv1_lr_events": [],
        "warmup_epochs": 0.0,
        "precision": "float32",
    }


def test_original_differs_from_paper_where_the_source_does_and_nowhere_else() -> None:
    paper = to_dict(PAPER)
    assert {field: value for field, value in to_dict(ORIGINAL).items() if value != paper[field]} == {
        "name": "original",
        "lighting": "original",
        "lighting_off_epoch": 67,
        "lrn_alpha_over_n": True,
        "spatial_norm": True,
        "conv1_order": "lrn-pool-relu",
        "init": "original",
        "bias_decay": 0.0,
        "bias_lr": 0.02,
        "schedule": "milestones",
        "lr_milestones": [25, 51, 79],
        "conv1_lr_events": [[67, 1e-5], [72, 0.0]],
    }


def test_recipes_are_known_by_their_names() -> None:
    assert {name: recipe.name for name, recipe in RECIPES.items()} == {n: n for n in RECIPES}
    assert {"paper", "original", "small", "demo"} <= set(RECIPES)


@pytest.mark.parametrize("name", ["small", "demo", "owt", "fast"])
def test_recipes_on_unit_variance_do_not_take_the_papers_initial_weights(name: str) -> None:
    """The commonest failure: 0.01 weights on unit-variance input stay at ln(classes)."""
    assert RECIPES[name].unit_variance
    assert RECIPES[name].init == "he"


def test_fast_is_the_papers_network_at_full_size_in_large_batches() -> None:
    fast = RECIPES["fast"]
    network = ("width", "maps", "num_towers", "activation", "lrn", "lrn_n", "lrn_k", "overlapping_pool", "dropout")
    assert all(getattr(fast, field) == getattr(PAPER, field) for field in network)
    assert fast.global_batch_size == 1024 and fast.epochs < PAPER.epochs
    assert fast.lr == pytest.approx(0.01 * fast.global_batch_size / 256)
    assert fast.schedule == "cosine" and fast.warmup_epochs > 0 and fast.precision == "auto"


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        PAPER.lr = 0.1  # type: ignore[misc]


def test_importing_recipes_imports_no_torch() -> None:
    code = "import sys, trainer.recipe; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'nvidia.dali')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Overrides.


@pytest.mark.parametrize(
    ("setting", "field", "value"),
    [
        ("lr=0.02", "lr", 0.02),
        ("lr = 2e-2", "lr", 0.02),
        ("epochs=3", "epochs", 3),
        ("lrn=false", "lrn", False),
        ("crop=No", "crop", False),
        ("unit_variance=TRUE", "unit_variance", True),
        ("num_towers=1", "num_towers", 1),
        ("activation=tanh", "activation", "tanh"),
        ("lighting=none", "lighting", None),
        ("lighting=original", "lighting", "original"),
        ("lighting_off_epoch=7", "lighting_off_epoch", 7),
        ("bias_lr=0.02", "bias_lr", 0.02),
        ("bias_decay=none", "bias_decay", None),
        ("lr_milestones=3,9", "lr_milestones", (3, 9)),
        ("lr_milestones=none", "lr_milestones", ()),
        ("conv1_lr_events=67:1e-5,72:0", "conv1_lr_events", ((67, 1e-5), (72, 0.0))),
        ("name=my-run_2", "name", "my-run_2"),
    ],
)
def test_override_reads_a_value_as_its_fields_type(setting: str, field: str, value: object) -> None:
    changed = override(ORIGINAL, [setting])
    assert getattr(changed, field) == value
    assert type(getattr(changed, field)) is type(value)
    assert changed == replace(ORIGINAL, **{field: value})


def test_overrides_apply_together_and_the_last_wins() -> None:
    assert override(PAPER, ["lr=1", "epochs=2", "lr=0.5"]) == replace(PAPER, lr=0.5, epochs=2)
    assert override(PAPER, []) == PAPER


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lr", "'lr': got no '=', expected field=value"),
        ("drop_out=0.5", "field 'drop_out' does not exist; did you mean dropout"),
        ("zzz=1", "field 'zzz' does not exist; expected one of name, mean, "),
        ("lr=fast", "field lr: got 'fast', expected a finite number"),
        ("lr=", "field lr: got '', expected a finite number"),
        ("lr=nan", "field lr: got nan, expected a finite number"),
        ("lr=1e999", "field lr: got inf, expected a finite number"),
        ("lr=none", "field lr: got 'none', expected a finite number"),
        ("lr=0", "field lr: got 0.0, expected more than 0"),
        ("epochs=1.5", "field epochs: got '1.5', expected a whole number"),
        ("epochs=0", "field epochs: got 0, expected a whole number of 1 or more"),
        ("global_batch_size=0", "field global_batch_size: got 0, expected a whole number of 1 or more"),
        ("global_batch_size=-128", "got -128"),
        ("lrn=maybe", "field lrn: got 'maybe', expected true or false"),
        ("lrn_n=4", "field lrn_n: got 4, expected an odd number"),
        ("maps=64,192,384,256", "field maps: got (64, 192, 384, 256), expected five whole numbers"),
        ("num_towers=3", "field num_towers: got '3', expected 1 or 2"),
        ("activation=gelu", "field activation: got 'gelu', expected relu or tanh"),
        ("lighting=strong", "field lighting: got 'strong', expected paper or original or none"),
        ("bias_lr=-1", "field bias_lr: got -1.0, expected 0 or more"),
        ("dropout=1", "field dropout: got 1.0, expected at least 0 and less than 1"),
        ("width=0", "field width: got 0.0"),
        ("momentum=1", "field momentum: got 1.0"),
        ("lr_milestones=3,x", "field lr_milestones: got '3,x', expected whole numbers"),
        ("lr_milestones=9,3", "field lr_milestones: got (9, 3), expected rising epochs"),
        ("lr_milestones=0,3", "field lr_milestones: got (0, 3), expected rising epochs"),
        ("conv1_lr_events=67", "field conv1_lr_events: got '67', expected epoch:rate pairs"),
        ("conv1_lr_events=67:-1", "expected rising epochs"),
        ("name=../up", "field name: got '../up'"),
    ],
)
def test_override_says_in_one_line_what_was_got_and_expected(setting: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        override(PAPER, [setting])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["none", "true", "0", "1", "-1", "1e-5", "nan", "inf", "1,2", "3:0.1,4:0", ",", ":", "1_0", "٣"]),
    st.integers().map(str),
    st.floats().map(str),
)


@given(st.sampled_from([field.name for field in fields(Recipe)]), TEXTS)
def test_override_gives_a_recipe_or_a_user_error(field: str, text: str) -> None:
    try:
        changed = override(PAPER, [f"{field}={text}"])
    except UserError as error:
        assert str(error)
    else:
        assert from_dict(to_dict(changed)) == changed


@given(st.text(max_size=30))
def test_override_of_any_text_gives_a_recipe_or_a_user_error(setting: str) -> None:
    try:
        override(PAPER, [setting])
    except UserError as error:
        assert "\n" not in str(error)


# To config.json and back.


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_round_trip_through_json_is_exact(recipe: Recipe) -> None:
    restored = from_dict(json.loads(json.dumps(to_dict(recipe))))
    assert restored == recipe
    assert to_dict(restored) == to_dict(recipe)


def test_a_recipe_of_the_first_runs_is_read_as_it_was() -> None:
    first = to_dict(RECIPES["demo"])
    for field in ("maps", "conv1_pad", "lrn_across_towers", "dropout_at"):
        del first[field]
    assert from_dict(first) == RECIPES["demo"]


def broken(**changes: Any) -> dict[str, Any]:
    return {**to_dict(PAPER), **changes}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (broken(colour=1), "unknown colour"),
        ({k: v for k, v in to_dict(PAPER).items() if k not in ("lr", "crop")}, "missing crop, lr"),
        (broken(lr="0.01"), "field lr: got '0.01', expected a finite number"),
        (broken(epochs=True), "field epochs: got True, expected a whole number"),
        (broken(crop=1), "field crop: got 1, expected true or false"),
        (broken(lr=None), "field lr: got None"),
        (broken(lr=10**400), "field lr: got 1000"),
        (broken(lr_milestones=[1, "2"]), "field lr_milestones: got (1, '2')"),
        (broken(conv1_lr_events=[[1, 0.1, 2]]), "field conv1_lr_events: got ((1, 0.1, 2),)"),
        (broken(mean={"a": 1}), "field mean: got {'a': 1}, expected image or channel"),
        ({}, "missing name, mean"),
    ],
)
def test_from_dict_names_what_does_not_fit(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_dict(values)
    assert message in str(caught.value)
