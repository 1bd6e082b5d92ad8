"""Every snippet of docs/data.md works as it is written."""

import gzip
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from everstep.trainer.config_load import parse_config
from everstep.trainer.data import TrainStream, open_corpus
from tests.support.cli import exit_code
from tests.support.corpora import write_texts

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def snippets(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that the page speaks of."""
    datasets = pytest.importorskip("datasets")
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    datasets.disable_progress_bars()
    write_texts(tmp_path / "books" / "deep")
    texts = [f"number {i} of many rows of text" for i in range(200)]
    lines = "\n".join(json.dumps({"content": text}) for text in texts)
    (tmp_path / "web.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    dirty = [json.dumps({"text": text}) for text in texts] + ["{"]
    (tmp_path / "dirty.jsonl").write_text("\n".join(dirty))
    parquet.write_table(pa.table({"content": texts}), tmp_path / "table.parquet")
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "hf_dataset"))
    (np.arange(5000) % 256).astype("<u2").tofile(tmp_path / "tokens.bin")
    (tmp_path / "my.yaml").write_text("train: {steps: 1}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def test_the_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in "".join(snippets("sh")).splitlines():
        words = shlex.split(command)
        assert words.pop(0) == "everstep"
        assert exit_code(*words) == 0, (command, capsys.readouterr())
    ran = 0
    for text in snippets("yaml"):
        config = parse_config(f"train: {{steps: 1}}\n{text}", "docs/data.md")
        if "s3://" in text:
            continue
        corpus = open_corpus(config.data, folder / "cache")
        (batch,) = TrainStream(corpus, config.data, 0, 0, 1).next_step()
        assert batch.tokens_BL.shape == (4, 64)
        ran += 1
    assert ran == 8
