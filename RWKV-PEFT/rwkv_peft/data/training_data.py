"""Opens a run's data, once: the training pairs, their rows and loss masks, and the validation set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from torch import Tensor
from torch.utils.data import default_collate

from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.binidx.reader import BinidxMeta, BinidxReader, check_tokenizer
from rwkv_peft.data.convert.json_pairs import pairs_of
from rwkv_peft.data.rows.mixture import MixedSamples
from rwkv_peft.data.rows.sampling import DataPlan, Part, RowSource, Samples, check_ids, make_plan
from rwkv_peft.data.rows.validation_split import training_documents
from rwkv_peft.data.tokenizer import WorldTokenizer
from rwkv_peft.data.validation_set import ValidationSet, open_validation


class TrainingData:
    """A run's data, opened and checked. Made by `open_data`.

    Args:
        config: the data flags.
        vocab_size: rows of the model's embedding; every token id is smaller.
        samples: the training rows.
        validation: the validation rows.
    """

    def __init__(
        self, config: DataConfig, vocab_size: int, samples: RowSource, validation: ValidationSet | None = None
    ) -> None:
        self.config = config
        self.vocab_size = vocab_size
        self.samples = samples
        self.validation = validation
        """None if the run has nothing to validate on."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """The training pairs and their shares of the rows."""
        return self.samples.parts

    @property
    def meta(self) -> BinidxMeta | None:
        """The sidecar of the first pair that has one; all sidecars agree on the tokenizer."""
        return _first_meta(part.samples.reader for part in self.parts)

    def check_tokenizer(self, identity: Mapping[str, str] | None, whose: str) -> None:
        """Raise DataError if a training or validation pair was made with a different tokenizer.

        Args:
            identity: of the expected tokenizer; None if it is unknown.
            whose: where `identity` comes from, for the error, such as "the adapter's".
        """
        readers = [part.samples.reader for part in self.parts]
        readers += [samples.reader for samples in self.validation.parts] if self.validation else []
        for reader in readers:
            check_tokenizer(reader, identity, whose)

    def plan(self, world_size: int) -> DataPlan:
        """Return the number of steps and passes of the run on `world_size` devices."""
        return make_plan(self.samples, self.config, world_size)

    def sample(self, epoch: int, index: int) -> dict[str, np.ndarray]:
        """Return training row `index` of an epoch; see `Samples.sample`."""
        return self.samples.sample(self.config.random_seed, epoch, index)

    def first_samples(self, count: int) -> Iterator[dict[str, Tensor]]:
        """Yield the run's first rows as batches of one row, for any batch size and number of devices."""
        for index in range(count):
            yield default_collate([self.sample(self.config.epoch_begin, index)])


def open_data(config: DataConfig, vocab_size: int = 0) -> TrainingData:
    """Open and check everything a run reads. Text and JSON are first converted, or found in the cache.

    Args:
        config: the data flags.
        vocab_size: rows of the model's embedding. 0: the largest vocabulary that a pair's sidecar names, or that of
            RWKV World if there is no sidecar; `TrainingData.vocab_size` is then the size of the model to make.
    Raises:
        DataError: a pair is missing, damaged, has token ids outside the vocabulary, or was made with a different
            tokenizer than the other pairs; a record cannot be converted; there is nothing to train or validate on.
        ConfigError: a flag does not fit the data.
    """
    readers = [BinidxReader(prefix) for prefix, _ in pairs_of(config)]
    vocab_size = vocab_size or _vocab_size_of(readers) or WorldTokenizer.vocab_size
    meta = _first_meta(readers)
    for reader in readers:
        check_tokenizer(reader, meta.tokenizer if meta else None, "the first --data_file")
    if config.val_fraction:
        for reader in readers:
            check_ids(reader, 0, len(reader.tokens), vocab_size)  # now, so that errors count documents as the file does
        readers = [training_documents(reader, config.val_fraction) for reader in readers]
    each = [Samples(reader, config, vocab_size, number) for number, reader in enumerate(readers)]
    samples = each[0] if len(each) == 1 else MixedSamples(each, [share for _, share in config.sources])
    return TrainingData(config, vocab_size, samples, open_validation(config, vocab_size, samples.parts))


def _vocab_size_of(readers: Sequence[BinidxReader]) -> int:
    return max((reader.meta.vocab_size for reader in readers if reader.meta), default=0)


def _first_meta(readers: Iterator[BinidxReader] | Sequence[BinidxReader]) -> BinidxMeta | None:
    return next((reader.meta for reader in readers if reader.meta), None)
