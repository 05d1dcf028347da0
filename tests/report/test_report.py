"""report.html: complete, self-contained, and safe with any text in it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rwkv_peft.config.sections import DataConfig, RunConfig, TrainConfig
from rwkv_peft.errors import UserError
from rwkv_peft.report.report import Sample, describe_ending, settings, size_in_words, write_report
from tests.report.pages import read_page

EVIL = '</pre></section><script>alert("1")</script><img src="http://x.invalid/a.png">&amp;\x1b[31m\ud800\0'


def report(folder: Path, summary="", trained="", samples=(), ending="finished", config=None, **more) -> None:
    """Write a report of a run of three steps."""
    folder.mkdir(exist_ok=True)
    lines = [
        {"step": n, "loss": 3.0 / n, "lr": 1e-3, "tokens": 5, "tokens_per_s": 2.0, "grad_norm": 1.0, "time": n}
        for n in range(1, 4)
    ]
    lines += more.pop("lines", [])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = config or RunConfig(train=TrainConfig(proj_dir=str(folder)), data=DataConfig(ctx_len=7))
    write_report(folder, config, summary, trained, samples, ending, **more)


def test_the_table_of_parameters_is_shown_apart_from_the_summary(tmp_path):
    report(tmp_path / "run", "model   tiny\ntrainable\n  all\ndata    some", "trainable\n  all")
    content = read_page(tmp_path / "run").content
    assert "model   tiny\ndata    some" in content
    assert "trainable\n  all" in content


def test_the_rate_of_all_tokens_counts_every_device(tmp_path):
    """4 rows of 7 tokens on 3 devices in 1 s."""
    report(tmp_path / "run", devices=3)
    assert "84/s (with padding and masked tokens)" in read_page(tmp_path / "run").content


def test_nothing_is_loaded_or_executed_and_texts_stay_texts(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a <b>&.txt").touch()
    report(
        tmp_path / "run", EVIL, samples=[Sample(EVIL, {0: EVIL, 3: ""})], ending=describe_ending(UserError(EVIL, "x"))
    )
    page = read_page(tmp_path / "run")
    assert not page.tags & {"script", "img", "link", "iframe", "object"}
    assert page.content.count('<script>alert("1")</script>') >= 4
    assert "\\x1b[31m?\\x00" in page.content
    assert "\x1b" not in page.content
    assert "a <b>&.txt" in page.content
    style = page.content[: page.content.index("Curves")]
    assert not re.search(r"@import|url\(", style)
    addresses = [value for name, value in page.attributes if name in ("href", "src", "action", "xlink:href")]
    assert addresses
    assert not any(":" in address or address.startswith("//") for address in addresses)
    assert not any(name.startswith("on") for name, _ in page.attributes)


def test_the_best_validation_is_shown_with_a_curve(tmp_path):
    report(tmp_path / "run")
    assert "best validation loss" not in read_page(tmp_path / "run").content
    lines = [{"step": step, "val_loss": loss, "val_ppl": 9.5, "time": 3.0} for step, loss in ((3, 2.25), (4, 2.5))]
    report(tmp_path / "run", lines=lines)
    page = read_page(tmp_path / "run")
    assert "2.250 at step 3" in page.content
    assert "other" in [value for name, value in page.attributes if name == "class"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (None, "finished"),
        (SystemExit(143), "stopped by a signal"),
        (SystemExit(130), "stopped by a signal"),
        (SystemExit(3), "ended with exit code 3"),
        (UserError("training step 3", "not finite"), "ended by an error: training step 3: not finite."),
        (ValueError("broken"), "ended by an error: ValueError('broken')"),
    ],
)
def test_the_ending_is_described(error, words):
    assert describe_ending(error) == words


def test_changed_settings_are_listed_separately():
    config = RunConfig(train=TrainConfig(logger=("csv", "wandb")), data=DataConfig(ctx_len=7, mask_id={"a": 1}))
    changed, everything = settings(config)
    assert changed == {"--logger": "csv wandb", "--ctx_len": "7", "--mask_id": '{"a": 1}'}
    assert {"--lr_init", "--n_layer", "--ctx_len"} <= set(everything)


def test_sizes_are_formatted():
    assert [size_in_words(n) for n in (0, 999, 1500, 2_340_000, 15_000_000_000)] == [
        "0 bytes", "999 bytes", "1.5 kB", "2.3 MB", "15.0 GB",
    ]  # fmt: skip
