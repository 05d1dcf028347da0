"""Training with Lightning and DeepSpeed: `run.train` takes a RunConfig and leaves trained weights.

`step.py` has one optimizer step from top to bottom, `hooks.py` what happens around steps. Imports every folder below;
Lightning and DeepSpeed are used only here and in data/datamodule.py.
"""
