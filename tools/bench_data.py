"""Measures how fast text is converted to tokens, and tokens are read as batches.

The first part compares tools/json2binidx.py with a simple loop over the trie tokenizer of the `rwkv` package. Both read
the same JSON lines and write the same bytes, which is checked. Rates are megabytes of JSON lines per second of CPU
time, so other programs on the machine have little influence. Each rate is the best of --runs turns, with the
vocabularies already loaded. Then the stages of the converter are measured separately.

The second part (bench_rows.py) measures batches per second for each --dataload mode, and how many more tokens in the
loss packing trains per second than padding.
"""

from __future__ import annotations

import argparse
import gettext
import itertools
import json
import os
import random
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT / folder) for folder in ("RWKV-PEFT", "", "tools")]

import numpy as np
from bench_rows import bench_packing, bench_reading, write_chat_like

from demo.corpus import python_texts
from rwkv_peft.data.binidx.writer import BinidxWriter
from rwkv_peft.data.convert.conversion import Options, convert
from rwkv_peft.data.convert.encode import pack_ids
from rwkv_peft.data.convert.record_text import RecordFormat, parse
from rwkv_peft.data.convert.sources import read_chunks
from rwkv_peft.data.tokenizer import WorldTokenizer
from rwkv_peft.errors import exit_with_message

PIECE = 4000
"""Number of characters in a document: a long answer, or a web page."""

SENTENCES = """\
The quick brown fox jumps over the lazy dog while the children watch from the old stone bridge.
Le conseil municipal s'est réuni hier soir pour examiner le budget de l'année prochaine, à huis clos.
Die Straßenbahn fährt wegen Bauarbeiten über eine Umleitung; bitte prüfen Sie größere Verspätungen.
El niño soñaba con montañas cubiertas de nieve y con ríos que corrían hacia el océano.
Добрый день! Сегодня мы поговорим о том, как языковые модели читают и понимают длинные тексты.
Η γλώσσα είναι το πιο πολύτιμο εργαλείο που έχει ο άνθρωπος για να σκέφτεται και να μοιράζεται.
今天天气很好,我们决定去公园散步,然后在河边的小餐馆里吃午饭,讨论下个月的计划。
人工智能的发展正在改变我们的工作方式,但是它也带来了许多需要认真思考的问题。
昨日は雨が降っていたので、家で本を読んだり、音楽を聴いたりして静かに過ごしました。
한국어 문장은 주어와 목적어 뒤에 서술어가 오기 때문에 끝까지 들어 보아야 뜻을 알 수 있습니다.
اللغة العربية من أكثر اللغات انتشارا في العالم، ويتحدث بها مئات الملايين من الناس كل يوم.
השפה העברית נכתבת מימין לשמאל, ורוב הטקסטים המודרניים נכתבים בלי סימני ניקוד.
हिन्दी भारत की प्रमुख भाषाओं में से एक है और करोड़ों लोग इसे प्रतिदिन बोलते और लिखते हैं।
ภาษาไทยเขียนติดกันโดยไม่มีช่องว่างระหว่างคำ จึงทำให้การตัดคำเป็นเรื่องที่ยากพอสมควร
Tiếng Việt dùng chữ Latinh với nhiều dấu thanh để phân biệt nghĩa của các từ giống nhau.
Polska pogoda bywa kapryśna: rano świeci słońce, po południu pada deszcz, a wieczorem wieje wiatr.
""".splitlines()
"""Sentences in several scripts, for a multilingual text on machines with few message catalogs."""

CATALOGS = "/usr/share"
"""Folder with the translated messages of installed programs (.mo files of GNU gettext)."""


def english(size: int) -> Iterator[str]:
    """Yield documents from Python's documentation and library, numbered and repeated up to `size` bytes."""
    pieces = [text[i : i + PIECE] for text in python_texts() for i in range(0, len(text), PIECE)]
    yield from numbered(pieces, size)


def multilingual(size: int) -> Iterator[str]:
    """Yield documents of translated messages, one language each, numbered and repeated up to `size` bytes.

    With few message catalogs on the machine, the documents are made from SENTENCES instead.
    """
    catalogs = sorted(Path(CATALOGS).rglob("*.mo"))
    random.Random(0).shuffle(catalogs)
    pages = [page for catalog in catalogs[:500] for page in translations(catalog)]
    if len(pages) < 500:
        pages = [*made_up_pages(500)]
    random.Random(0).shuffle(pages)
    yield from numbered(pages, size)


def numbered(pages: Sequence[str], size: int) -> Iterator[str]:
    """Yield the pages repeatedly, each with its number, until there are `size` bytes."""
    for number in itertools.count():
        if size <= 0:
            return
        text = f"{number}. {pages[number % len(pages)]}"
        size -= len(text.encode())
        yield text


def translations(catalog: Path) -> Iterator[str]:
    """Yield the messages of a .mo file in pieces; nothing if the file is damaged."""
    try:
        with catalog.open("rb") as file:
            messages = gettext.GNUTranslations(file)._catalog.values()  # type: ignore[attr-defined]
    except (OSError, ValueError, LookupError):
        return
    text = "\n".join(map(str, messages))
    yield from (text[i : i + PIECE] for i in range(0, len(text), PIECE))


def made_up_pages(count: int) -> Iterator[str]:
    """Yield pages of random sentences in all scripts, with random numbers."""
    rng = random.Random(0)
    for _ in range(count):
        yield "\n".join(f"{rng.choice(SENTENCES)} {rng.randrange(10 ** rng.randrange(1, 6))}" for _ in range(30))


CORPORA: Mapping[str, Callable[[int], Iterator[str]]] = {"english": english, "multilingual": multilingual}


class MegatronWriter:
    """Writes the files as RWKV-LM's make_data.py does with Megatron's MMapIndexedDatasetBuilder."""

    def __init__(self, prefix: str) -> None:
        self._prefix, self._file = prefix, open(prefix + ".bin", "wb")  # noqa: SIM115
        self._sizes: list[int] = []
        self._marks = [0]

    def add_item(self, array: np.ndarray) -> None:
        self._file.write(array.tobytes(order="C"))
        self._sizes.append(array.size)

    def end_document(self) -> None:
        self._marks.append(len(self._sizes))

    def finalize(self) -> None:
        self._file.close()
        pointers, address = [], 0
        for size in self._sizes:
            pointers.append(address)
            address += size * 2
        with open(self._prefix + ".idx", "wb") as index:
            index.write(b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, 8))
            index.write(struct.pack("<QQ", len(self._sizes), len(self._marks)))
            index.write(np.array(self._sizes, dtype=np.int32).tobytes(order="C"))
            index.write(np.array(pointers, dtype=np.int64).tobytes(order="C"))
            index.write(np.array(self._marks, dtype=np.int64).tobytes(order="C"))


def load_trie() -> Any:
    import rwkv
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    return TRIE_TOKENIZER(str(Path(rwkv.__file__).with_name("rwkv_vocab_v20230424.txt")))


def plain_loop(source: str, prefix: str, tokenizer: Any) -> None:
    """Convert with a simple loop."""
    builder = MegatronWriter(prefix)
    with open(source, encoding="utf-8") as file:
        for line in file:
            ids = tokenizer.encode(json.loads(line)["text"])
            builder.add_item(np.array([*ids, 0], dtype=np.uint16))
            builder.end_document()
    builder.finalize()


def ours(source: str, prefix: str, tokenizer: WorldTokenizer) -> None:
    convert([source], prefix, tokenizer, RecordFormat(), Options(workers=1))


def cpu_seconds(case: Callable[[], object]) -> float:
    begun = time.process_time()
    case()
    return time.process_time() - begun


def same_files(a: str, b: str) -> bool:
    return all(Path(a + suffix).read_bytes() == Path(b + suffix).read_bytes() for suffix in (".bin", ".idx"))


def stage_seconds(source: str, prefix: str, tokenizer: WorldTokenizer) -> dict[str, float]:
    """Return the CPU seconds of each stage alone. Its input is the output of the stage before it."""
    layout = RecordFormat()
    made: dict[str, list] = {}

    def stage(name: str, work: Callable[[], Iterable]) -> float:
        def run() -> None:
            made[name] = list(work())

        return cpu_seconds(run)

    def write(blocks: Sequence[bytes]) -> Iterator[None]:
        with BinidxWriter(prefix, tokenizer) as writer:
            for block in blocks:
                writer.add_encoded(block, (len(block) // 2,))
        yield None

    return {
        "read": stage("raw", lambda: (raw for chunk in read_chunks([source]) for raw in chunk.records)),
        "parse": stage("text", lambda: (layout.segments(parse(raw))[0][0] for raw in made["raw"])),
        # The ids are discarded immediately, as in the converter: keeping millions of them would be slower.
        "tokenize": stage("", lambda: (tokenizer.encode(text) and None for text in made["text"])),
        "pack": _pack_seconds(made, tokenizer),
        "write": cpu_seconds(lambda: list(write(made["block"]))),
    }


def _pack_seconds(made: dict[str, list], tokenizer: WorldTokenizer) -> float:
    """Return the seconds for converting lists of ids to bytes, measured between calls of the tokenizer."""
    seconds, blocks = 0.0, []
    for text in made["text"]:
        ids = tokenizer.encode(text)
        begun = time.perf_counter()
        blocks.append(pack_ids(ids, np.dtype("<u2")))
        seconds += time.perf_counter() - begun
    made["block"] = blocks
    return seconds


def bench_convert(megabytes: float, runs: int) -> None:
    """Print the rates for each corpus."""
    trie, world = load_trie(), WorldTokenizer()
    with tempfile.TemporaryDirectory() as folder:
        for name, corpus in CORPORA.items():
            source = f"{folder}/{name}.jsonl"
            with open(source, "w", encoding="utf-8") as file:
                for text in corpus(int(megabytes * 1e6)):
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size = os.path.getsize(source) / 1e6
            slow, fast, stages = [], [], []
            for _ in range(runs):
                slow.append(cpu_seconds(lambda: plain_loop(source, f"{folder}/plain", trie)))  # noqa: B023
                fast.append(cpu_seconds(lambda: ours(source, f"{folder}/ours", world)))  # noqa: B023
                stages.append(stage_seconds(source, f"{folder}/stage", world))
            if not same_files(f"{folder}/plain", f"{folder}/ours"):
                raise AssertionError(f"{name}: the two programs wrote different files")
            print(f"{name}: {size:.1f} MB of JSON lines, one core; both write the same bytes")
            print(f"  json2binidx.py          {size / min(fast):7.1f} MB/s   {min(slow) / min(fast):.1f}x the loop")
            print(f"  loop over rwkv's trie   {size / min(slow):7.1f} MB/s")
            best = {stage: min(run[stage] for run in stages) for stage in stages[0]}
            shares = "  ".join(f"{stage} {seconds / sum(best.values()):.0%}" for stage, seconds in best.items())
            print(f"  stages: {shares}; {max(best, key=best.__getitem__)} limits")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=8, help="size of each corpus [8]")
    parser.add_argument("--runs", type=int, default=5, help="number of turns; the best one counts [5]")
    parser.add_argument("--debug", action="store_true", help="show Python tracebacks for errors in the input")
    parser.add_argument(
        "--documents", type=int, default=20_000, help="number of documents in the chat-like data [20000]"
    )
    parser.add_argument("--ctx_len", type=int, default=2048, help="tokens per row [2048]")
    parser.add_argument("--micro_bsz", type=int, default=2, help="rows per batch [2]")
    parser.add_argument("--batches", type=int, default=500, help="batches read in each turn [500]")
    parser.add_argument("--steps", type=int, default=8, help="steps trained in each turn [8]")
    args = parser.parse_args(argv)
    bench_convert(args.megabytes, args.runs)
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "chat"
        write_chat_like(prefix, english(10**12), args.documents)
        bench_reading(prefix, args)
        bench_packing(prefix, args)


if __name__ == "__main__":
    exit_with_message(main)
