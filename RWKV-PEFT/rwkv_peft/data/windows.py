"""Windows of an epoch: the batches that are summed into one optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader


class WindowLoader(DataLoader):
    """A DataLoader that reads one window ahead, so that its batches know how many tokens train in the whole of it.

    To each batch, a dict with `loss_mask`, it adds `tokens`: how many of its targets train; and to the first of a
    window `window_tokens`: how many do in all its batches. Both are ints, of this process alone.

    Args:
        window: batches of one optimizer step; the last window of an epoch has what is left.
        others: as of DataLoader.
    """

    def __init__(self, *args: Any, window: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.window = window

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = super().__iter__()
        while window := list(islice(batches, self.window)):
            for batch in window:
                batch["tokens"] = int(batch["loss_mask"].sum())
            window[0]["window_tokens"] = sum(batch["tokens"] for batch in window)
            yield from window
