"""Batches -> a trained AlexNet. Stands on `pipeline`; knows nothing of `tools`."""
