"""`rwkv-peft report`: the report of a run that was killed before it could write one."""

from __future__ import annotations

import json

import pytest

from rwkv_peft.commands import report
from rwkv_peft.config.sections import DataConfig, RunConfig, TrainConfig
from rwkv_peft.config.yaml_file import write_yaml
from rwkv_peft.errors import UserError
from tests.report.pages import read_page


def test_a_report_is_written_from_config_and_metrics(tmp_path, capsys):
    config = RunConfig(train=TrainConfig(proj_dir=str(tmp_path), devices="2"), data=DataConfig(ctx_len=7))
    write_yaml(config, tmp_path / "config.yaml")
    lines = [{"step": n, "loss": 3.0 / n, "lr": 1e-3, "tokens": 5, "tokens_per_s": 2.0, "time": n} for n in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    report.main([str(tmp_path)])
    assert capsys.readouterr().out == f"wrote {tmp_path}/report.html\n"
    content = read_page(tmp_path).content
    assert "written after the run" in content
    assert "--ctx_len" in content
    assert "56/s (with padding" in content  # 2 devices x 4 rows x 7 tokens in 1 s
    assert "Hardware" not in content
    with pytest.raises(UserError, match=r"report\.html: already exists\. Delete or rename it first\.$"):
        report.main([str(tmp_path)])


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl: no such file; expected the folder of a run\.$"):
        report.main([str(tmp_path)])
