"""The Python of docs/loops.md works as it is written, one snippet after the other."""

import re
from pathlib import Path

import pytest
import torch

from everstep.checkpoint.commit import CheckpointDirectory

PAGE = Path(__file__).parents[2] / "docs" / "loops.md"


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text = PAGE.read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, str(PAGE), "exec"), names)
    newest = [CheckpointDirectory(tmp_path / d).find(None) for d in ("checkpoints", "averaged")]
    assert [found.step for found in newest if found] == [199, 19]
