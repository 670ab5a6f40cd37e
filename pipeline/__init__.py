"""Shards on disk -> batches on the device. `from pipeline import ShardSet, ColorStats, TrainLoader, EvalLoader`.

Names are resolved on first use, so that `import pipeline.common.console` does not pull in DALI and torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.colors import ColorStats
    from pipeline.common.errors import UserError
    from pipeline.loader import Batch, EvalLoader, TrainLoader
    from pipeline.options import LoaderOptions, Transform
    from pipeline.shards import ShardSet

__all__ = ["Batch", "ColorStats", "EvalLoader", "LoaderOptions", "ShardSet", "TrainLoader", "Transform", "UserError"]

_HOME = {
    "Batch": "pipeline.loader",
    "ColorStats": "pipeline.colors",
    "EvalLoader": "pipeline.loader",
    "LoaderOptions": "pipeline.options",
    "ShardSet": "pipeline.shards",
    "TrainLoader": "pipeline.loader",
    "Transform": "pipeline.options",
    "UserError": "pipeline.common.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)
