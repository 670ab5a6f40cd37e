"""The command that makes a run again, from what its config.json holds.

The decision that shaped it: it names a recipe and what differs from it, so that it is short, stays right for a run that
was resumed by other words, and shows what was special about it. Left out: the shards' making, and the version of the
code, which environment.json records.
"""

import shlex
from typing import Any

from trainer.recipe import RECIPES, Recipe, from_dict

_OWN_FLAGS = {"epochs": "--epochs", "global_batch_size": "--global-batch-size", "lr": "--lr"}
_FEEDING = {"decode": "--decode", "host_share": "--host-share", "cache_gib": "--cache-gib"}


def repeat_command(config: dict[str, Any]) -> str:
    """A line for a shell. Raises UserError for a recipe that this version does not know."""
    recipe = from_dict(config["recipe"])
    known = RECIPES.get(recipe.name, RECIPES["paper"])
    words = ["--shards", str(config.get("shards", "shards")), "--recipe", known.name]
    for field, text in spell_changes(recipe, known).items():
        words += [_OWN_FLAGS[field], text] if field in _OWN_FLAGS else ["--set", f"{field}={text}"]
    words += ["--seed", str(config.get("seed", 0))]
    weights, parallel, feeding = (config.get(name) or {} for name in ("weights", "parallel", "feeding"))
    if weights:
        words += ["--weights", str(weights.get("source", ""))]
    num_ranks, on_gpu = int(config.get("world_size", 1)), config.get("device") == "cuda"
    if num_ranks > 1 and parallel:
        words += ["--parallel", str(parallel.get("mode", "data"))]
        if parallel.get("gradients", "float32") != "float32":
            words += ["--gradients", str(parallel["gradients"])]
    for field, flag in _FEEDING.items():
        if feeding.get(field) not in (None, "auto"):
            words += [flag, str(feeding[field])]
    if on_gpu or num_ranks == 1:
        start = ["alexnet-train", "--gpus", str(num_ranks if on_gpu else 0)]
    else:
        start = ["torchrun", "--nproc-per-node", str(num_ranks), "-m", "trainer", "--gpus", "0"]
    return shlex.join([*start, *words])


def spell_changes(recipe: Recipe, known: Recipe) -> dict[str, str]:
    """The fields in which `recipe` differs from `known`, but for the name, as `--set` takes them."""
    pairs = {field: (getattr(recipe, field), getattr(known, field)) for field in vars(known) if field != "name"}
    return {field: spell_value(value) for field, (value, other) in pairs.items() if value != other}


def spell_value(value: Any) -> str:
    """A field's value in the form that recipe.override reads."""
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(":".join(map(str, item)) if isinstance(item, tuple) else str(item) for item in value)
    return str(value)
