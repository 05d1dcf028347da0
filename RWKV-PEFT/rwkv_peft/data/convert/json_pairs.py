"""The pairs that a run reads: those that --data_file names, or those made of the JSON that it names.

With `--data_type jsonl` or `sft`, each --data_file (a file, folder or glob) goes through the converter once; its tokens
are kept in a cache (`token_cache.py`) and found there again while content and settings stay the same.
"""

from __future__ import annotations

from pathlib import Path

from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.binidx.reader import find_prefix
from rwkv_peft.errors import DataError


def pairs_of(config: DataConfig) -> tuple[tuple[str, float | None], ...]:
    """Prefix and share of each pair. JSON that is not in the cache yet is converted now.

    Raises:
        DataError: a file is of the other data type, cannot be read, or holds a bad record (names file and line); the
            cache cannot be written.
        ConfigError: as the tokenizer, the template, or `Layout` has it.
    """
    if config.data_type == "binidx":
        for path, _ in config.sources:
            if Path(path).exists() and not _is_pair(path):
                what = f"is a {'folder' if Path(path).is_dir() else 'file'}, not the prefix of a binidx pair"
                raise DataError(path, what, hint="Train straight from JSON and text with --data_type jsonl.")
        return config.sources
    for path, _ in config.sources:
        if _is_pair(path) and (not Path(path).exists() or path.endswith((".bin", ".idx"))):
            hint = "Leave --data_type away, or name the text that the pair was made of."
            raise DataError(path, f"is a binidx pair, which --data_type {config.data_type} does not read", hint=hint)
    # Imported late: a run on pairs waits for no tokenizer and no converter.
    from rwkv_peft.data.convert.records import Layout
    from rwkv_peft.data.convert.templates import read_template
    from rwkv_peft.data.convert.token_cache import TokenCache, cache_root
    from rwkv_peft.data.tokenizer import load_tokenizer

    template = read_template(config.template) if config.template else None
    layout = Layout(config.text_key or None, config.fields or None, template)
    cache = TokenCache(cache_root(), load_tokenizer(config.tokenizer), layout)
    return tuple((cache.pair(path), share) for path, share in config.sources)


def _is_pair(path: str) -> bool:
    return Path(find_prefix(path) + ".idx").exists()
