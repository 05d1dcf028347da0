"""The training engine, on Lightning and DeepSpeed."""
