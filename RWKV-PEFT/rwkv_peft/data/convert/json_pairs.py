"""The pairs that a run reads: the pairs given by --data_file, or pairs made from the JSON given by --data_file.

With `--data_type jsonl` or `sft`, each --data_file (a file, folder or glob pattern) is converted once. The tokens stay
in a cache (token_cache.py) and are used again as long as content and settings are the same.
"""

from __future__ import annotations

from pathlib import Path

from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.binidx.reader import find_prefix
from rwkv_peft.errors import DataError


def pairs_of(config: DataConfig) -> tuple[tuple[str, float | None], ...]:
    """Return the prefix and the share of each pair. JSON that is not in the cache is converted first.

    Raises:
        DataError: a file has the other data type, cannot be read, or has an invalid record (the error names its file
            and line); or the cache cannot be written.
        ConfigError: the tokenizer, the template or the keys of records are invalid.
    """
    if config.data_type == "binidx":
        for path, _ in config.sources:
            if Path(path).exists() and not _is_pair(path):
                what = f"is a {'folder' if Path(path).is_dir() else 'file'}, not the prefix of a binidx pair"
                raise DataError(path, what, hint="To train on JSON or text, use --data_type jsonl.")
        return config.sources
    for path, _ in config.sources:
        if _is_pair(path) and (not Path(path).exists() or path.endswith((".bin", ".idx"))):
            hint = "Omit --data_type, or give the text that the pair was made from."
            raise DataError(
                path, f"is a binidx pair, but --data_type {config.data_type} reads JSON and text", hint=hint
            )
    # Imported late: a run on pairs needs neither tokenizer nor converter.
    from rwkv_peft.data.convert.jinja_template import read_template
    from rwkv_peft.data.convert.record_text import RecordFormat
    from rwkv_peft.data.convert.token_cache import TokenCache, cache_root
    from rwkv_peft.data.tokenizer import load_tokenizer

    template = read_template(config.template) if config.template else None
    record_format = RecordFormat(config.text_key or None, config.fields or None, template)
    cache = TokenCache(cache_root(), load_tokenizer(config.tokenizer), record_format)
    return tuple((cache.pair(path), share) for path, share in config.sources)


def _is_pair(path: str) -> bool:
    return Path(find_prefix(path) + ".idx").exists()
