"""YAML for configs: read with line numbers, written so that it reads back equal.

Differs from plain PyYAML where that surprises people: ``3e-4`` is a number, ``yes``/``no``/``on``
and dates are text, a key given twice is an error instead of the last one winning.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from everstep.trainer.errors import ConfigError

_FLOAT = r"""[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?
            |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"""
# Order counts: the first pattern that matches wins, so whole numbers are tried before floats.
_SCALARS: list[tuple[str, str, str]] = [
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    ("tag:yaml.org,2002:float", _FLOAT, "-+0123456789."),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN"),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
]


class _Loader(yaml.SafeLoader):
    """Safe YAML with the core schema of YAML 1.2 for plain scalars."""


class _Dumper(yaml.SafeDumper):
    """Quotes every text that either this module or plain PyYAML would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _register() -> None:
    _Loader.yaml_implicit_resolvers = {}
    for tag, pattern, first in _SCALARS:
        firsts: list[str] = [*first, ""] if tag.endswith("null") else [*first]
        _Loader.add_implicit_resolver(tag, re.compile(rf"^(?:{pattern})$", re.VERBOSE), firsts)
    _Dumper.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(rf"^(?:{_FLOAT})$", re.VERBOSE), [*"-+0123456789."]
    )


_register()


@dataclass(frozen=True)
class Document:
    """A parsed YAML mapping, and where each dotted key was written (line numbers from 1)."""

    values: dict[str, Any]
    lines: dict[str, int]


def parse_document(text: str, source: str) -> Document:
    """Parse one YAML mapping; ``source`` names the text in errors.

    Raises ConfigError for a syntax error, a key given twice, or anything but a mapping.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if not isinstance(node, yaml.MappingNode):
                raise ConfigError(
                    f"{source}: expected sections such as 'train:', found {_kind(node)}"
                )
            lines = dict(_keys_below(node, "", source, frozenset()))
            return Document(loader.construct_document(node), lines)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError) as error:  # ValueError: '!!int x', numbers without end
        raise ConfigError(_syntax_error(error, source)) from None


def parse_scalar(text: str) -> Any:
    """The value of ``key=text`` on a command line.

    Brackets, braces and quotes are parsed as YAML; anything else is one plain scalar, so that
    ``data.source=*.txt`` is text although ``*`` starts an alias in YAML. Raises ValueError.
    """
    text = text.strip()
    loader = _Loader(text)
    try:
        if text[:1] in "[{\"'" and text:
            return loader.get_single_data()
        tag = _plain_tag(loader, text)
        if tag.endswith(":merge"):
            return text
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except yaml.YAMLError as error:
        raise ValueError(getattr(error, "problem", None) or str(error)) from None
    finally:
        loader.dispose()


def _plain_tag(loader: _Loader, text: str) -> str:
    tag: str = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    return tag


def dump_yaml(values: dict[str, Any]) -> str:
    """YAML text in the order of ``values`` that ``parse_document`` reads back equal."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text


def _keys_below(
    node: yaml.Node, prefix: str, source: str, above: frozenset[int]
) -> Iterator[tuple[str, int]]:
    """(dotted key, line) of every key in a node, entries of lists being ``key[number]``.

    Raises ConfigError for a key that is given twice, and for what contains itself.
    """
    if id(node) in above:  # an alias to something around it
        raise ConfigError(f"{source}, line {_line(node)}: a section contains itself")
    if isinstance(node, yaml.MappingNode):
        yield from _keys_of(node, prefix, source, above | {id(node)})
    elif isinstance(node, yaml.SequenceNode):
        for number, entry in enumerate(node.value):
            here = f"{prefix.removesuffix('.')}[{number}]."
            yield from _keys_below(entry, here, source, above | {id(node)})


def _keys_of(
    mapping: yaml.MappingNode, prefix: str, source: str, above: frozenset[int]
) -> Iterator[tuple[str, int]]:
    seen: dict[str, int] = {}
    for key_node, value_node in mapping.value:
        key = f"{prefix}{key_node.value}"
        if key in seen:
            raise ConfigError(
                f"{source}, line {_line(key_node)}: {key} is already given on line {seen[key]}; "
                "remove one of them"
            )
        seen[key] = _line(key_node)
        yield key, seen[key]
        yield from _keys_below(value_node, f"{key}.", source, above)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _kind(node: yaml.Node | None) -> str:
    if node is None:
        return "nothing"
    return "a list" if isinstance(node, yaml.SequenceNode) else f"only {node.value!r}"


def _syntax_error(error: yaml.YAMLError | ValueError, source: str) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        problem = error.problem or error.context
        return f"{source}, line {error.problem_mark.line + 1}: not valid YAML: {problem}"
    return f"{source}: not valid YAML: {' '.join(str(error).split())}"
