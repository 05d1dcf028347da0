"""From text to batches: tokenizer -> binidx pair -> sample(seed, epoch, index) -> mask -> DataModule."""
