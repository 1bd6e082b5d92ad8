"""The snippets of docs/dcp.md work as they are written, one after the other, on one rank."""

import os
import re
from pathlib import Path

import pytest

from tests.support.spawn import run_ranks

PAGE = Path(__file__).parents[2] / "docs" / "dcp.md"


def _run(rank: int, world_size: int, folder: str) -> int:
    os.chdir(folder)
    text = PAGE.read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, str(PAGE), "exec"), names)
    return len(snippets)


@pytest.mark.multiproc
def test_the_page(tmp_path: Path) -> None:
    assert run_ranks(_run, 1, str(tmp_path)) == [4]
    assert (tmp_path / "exported" / ".metadata").exists()
