"""Done once, before training: images -> shards, shards -> colour statistics. Stands on `pipeline`."""
