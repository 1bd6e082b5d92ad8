"""The programs of docs/views.md, as text and as functions to call."""

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEXT = (Path(__file__).parents[2] / "docs" / "views.md").read_text(encoding="utf-8")


def programs(section: str, language: str = "python") -> str:
    """The snippets of a section, one after another."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
    snippets = re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert snippets
    return "\n".join(snippets)


def function(section: str, name: str) -> Callable[..., Any]:
    """A function of a section, without running what is around it."""
    tree = ast.parse(programs(section))
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef)
    tree.body = [node for node in tree.body if isinstance(node, kinds)]
    names: dict[str, Any] = {}
    exec(compile(tree, "docs/views.md", "exec"), names)
    found: Callable[..., Any] = names[name]
    return found
