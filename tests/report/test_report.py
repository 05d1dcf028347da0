"""report.html: there however a run ends, whole, self-contained, and safe with any text in it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rwkv_peft.config.sections import DataConfig, RunConfig, TrainConfig
from rwkv_peft.errors import UserError
from rwkv_peft.report.report import LeavesReport, settings, size_in_words
from rwkv_peft.training.sample_texts import Sample
from tests.training.small_runs import train, write_inputs

BONE = ["--peft", "bone", "--bone_config", '{"r":16}']
VOID = {"meta", "line", "polyline", "circle", "br"}
EVIL = '</pre></section><script>alert("1")</script><img src="http://x.invalid/a.png">&amp;\x1b[31m\ud800\0'


class Page(HTMLParser):
    """Tags must close in order; collects tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.content = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.content += data


def read_page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def leave(folder: Path, error: BaseException | None = None, rows: int = 3, **parts) -> None:
    """A run of `rows` steps in a few lines, which ends with `error`."""
    values = {
        "summary": "model   tiny\nwhat trains\n  all\ndata    some",
        "trained": "what trains\n  all",
        "samples": [],
    }
    config = RunConfig(train=TrainConfig(proj_dir=str(folder), strategy="ddp"), data=DataConfig(ctx_len=7))
    with LeavesReport(config, **{**values, **parts}) as report:
        folder.mkdir(exist_ok=True)
        lines = [
            {"step": n, "loss": 3.0 / n, "lr": 1e-3, "tokens": 5, "tokens_per_s": 2.0, "grad_norm": 1.0, "time": n}
            for n in range(1, rows + 1)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        report.after_step(None, None)
        if error is not None:
            raise error


def test_a_run_leaves_a_report_that_names_everything(tmp_path):
    inputs = write_inputs(tmp_path)
    (tmp_path / "prompts.txt").write_text("User: <b>Hi</b>\n")
    rows = train(tmp_path / "run", inputs, *BONE, "--sample_prompts", f"{tmp_path}/prompts.txt", "--logger", "csv")
    page = read_page(tmp_path / "run")
    for words in (
        "finished", "User: <b>Hi</b>", "Before training", "After step 6", "--lr_init", "blocks.*.att.key.bone",
        "96 documents", "rwkv-0.safetensors", "metrics.csv", "torch", "Python", "cores", "GiB", "all tokens",
        f"{sum(row['tokens'] for row in rows):,}",
    ):  # fmt: skip
        assert words in page.content, words
    assert [value for name, value in page.attributes if name == "aria-label"] == [
        "Loss, nats per token",
        "Learning rate",
        "Gradient norm, before clipping",
        "Trained tokens per second",
    ]
    for address in (value for name, value in page.attributes if name == "href"):
        assert (tmp_path / "run" / address).exists()


def test_nothing_is_fetched_or_run_and_texts_stay_texts(tmp_path):
    samples = [Sample(EVIL, {0: EVIL, 3: ""})]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a <b>&.txt").touch()
    with pytest.raises(UserError):
        leave(tmp_path / "run", UserError(EVIL, "x"), summary=EVIL, samples=samples)
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


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (None, "finished"),
        (SystemExit(143), "stopped by a signal"),
        (SystemExit(130), "stopped by a signal"),
        (UserError("training step 3", "not finite"), "ended by an error: training step 3: not finite."),
        (ValueError("broken"), "ended by an error: ValueError('broken')"),
    ],
)
def test_a_report_is_left_however_the_run_ends(error, words, tmp_path):
    if error is None:
        leave(tmp_path / "run")
    else:
        with pytest.raises(type(error)):
            leave(tmp_path / "run", error)
    assert words in read_page(tmp_path / "run").content


def test_without_a_step_there_is_nothing_to_report(tmp_path):
    with (
        pytest.raises(ValueError, match="early"),
        LeavesReport(RunConfig(train=TrainConfig(proj_dir=str(tmp_path / "none"))), "", "", []),
    ):
        raise ValueError("early")
    assert not (tmp_path / "none").exists()


def test_a_report_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    leave(tmp_path / "run")
    assert re.fullmatch(r"note: no report.html: \w+: .*\n", capsys.readouterr().err)


def test_validation_has_its_curve(tmp_path):
    leave(tmp_path / "run")
    assert "best validation loss" not in read_page(tmp_path / "run").content
    lines = [{"step": step, "val_loss": loss, "val_ppl": 9.5, "time": 3.0} for step, loss in ((3, 2.25), (4, 2.5))]
    path = tmp_path / "run" / "metrics.jsonl"
    report = LeavesReport(RunConfig(train=TrainConfig(proj_dir=str(path.parent))), "", "", [])
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    report.write("finished")
    page = read_page(path.parent)
    assert "2.250 at step 3" in page.content
    assert "other" in [value for name, value in page.attributes if name == "class"]


def test_settings_that_differ_come_first():
    config = RunConfig(train=TrainConfig(logger=("csv", "wandb")), data=DataConfig(ctx_len=7, mask_id={"a": 1}))
    changed, everything = settings(config)
    assert changed == {"--logger": "csv wandb", "--ctx_len": "7", "--mask_id": '{"a": 1}'}
    assert {"--lr_init", "--n_layer", "--ctx_len"} <= set(everything)


def test_sizes_in_words():
    assert [size_in_words(n) for n in (0, 999, 1500, 2_340_000, 15_000_000_000)] == [
        "0 bytes", "999 bytes", "1.5 kB", "2.3 MB", "15.0 GB",
    ]  # fmt: skip
