"""What a config may contain, asked of the pydantic models: keys, nearest key, allowed values."""

import difflib
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from everstep.trainer.config import RunConfig, Section

Path = tuple[str, ...]

ELSEWHERE = {
    "batch_size": "data.global_batch",
    "d_model": "model.dim",
    "dtype": "parallel.precision",
    "epochs": "train.steps",
    "grad_clip": "optim.clip_norm",
    "gradient_accumulation_steps": "data.micro_batch",
    "hidden_size": "model.dim",
    "intermediate_size": "model.ffn_dim",
    "learning_rate": "optim.lr",
    "max_grad_norm": "optim.clip_norm",
    "n_embd": "model.dim",
    "save_steps": "checkpoint.every_steps",
    "pipeline_parallel": "mesh.pp",
    "pp_size": "mesh.pp",
    "tensor_parallel": "mesh.tp",
    "tp_size": "mesh.tp",
    "fsdp": "mesh.dp_shard",
}
"""Names of the same things in other training programs, which no similarity of words would find."""


def section_of(field: FieldInfo) -> type[Section] | None:
    """The model behind a field that is a section; None for a field that holds a value."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def field_path(loc: Sequence[int | str], root: type[Section] = RunConfig) -> Path:
    """The longest beginning of a pydantic error location that names a known section or field.

    What follows in the location (branches of a union, list positions) is pydantic's own affair.
    """
    path: list[str] = []
    section: type[Section] | None = root
    for part in loc:
        if section is None or part not in section.model_fields:
            break
        path.append(str(part))
        section = section_of(section.model_fields[str(part)])
    return tuple(path)


def field_at(path: Sequence[str], root: type[Section] = RunConfig) -> FieldInfo | None:
    """The field that a path names, None when there is none."""
    section: type[Section] | None = root
    field: FieldInfo | None = None
    for part in path:
        if section is None or part not in section.model_fields:
            return None
        field = section.model_fields[part]
        section = section_of(field)
    return field


def takes_any_key(path: Sequence[str], root: type[Section] = RunConfig) -> bool:
    """True below a field that is itself a free mapping, such as ``model.factory_args``."""
    for length in range(1, len(path)):
        field = field_at(path[:length], root)
        if field is not None and get_origin(field.annotation) is dict:
            return True
    return False


def keys(root: type[Section] = RunConfig, prefix: Path = ()) -> Iterator[Path]:
    """Every section and every field, sections before their fields."""
    for name, field in root.model_fields.items():
        yield (*prefix, name)
        section = section_of(field)
        if section is not None:
            yield from keys(section, (*prefix, name))


def nearest_key(path: Sequence[str], root: type[Section] = RunConfig) -> str | None:
    """The valid dotted key that was probably meant.

    In this order: the same last word in another section, its name in other programs, a similar
    word in the same section, a similar dotted key, a similar last word; None when nothing is near.
    """
    dotted = ".".join(path)
    valid = [key for key in keys(root) if key != tuple(path[: len(key)])]
    same_word = [key for key in valid if key[-1] == path[-1]]
    if same_word:
        return ".".join(same_word[0])
    if path[-1] in ELSEWHERE and tuple(ELSEWHERE[path[-1]].split(".")) in valid:
        return ELSEWHERE[path[-1]]
    beside = [key for key in valid if key[:-1] == tuple(path[:-1])]
    for candidates, wanted in (
        ({key[-1]: key for key in beside}, path[-1]),
        ({".".join(key): key for key in valid if key not in beside}, dotted),
        ({key[-1]: key for key in valid}, path[-1]),
    ):
        close = difflib.get_close_matches(wanted, candidates, n=1, cutoff=0.6)
        if close:
            return ".".join(candidates[close[0]])
    return None


def describe(field: FieldInfo) -> str:
    """What a field accepts, in words: ``an integer >= 1 or 'auto'``."""
    section = section_of(field)
    if section is not None:
        return f"a section with the keys {', '.join(section.model_fields)}"
    return _describe(field.annotation, field.metadata)


def _describe(kind: Any, metadata: Sequence[Any]) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        below = [m for item in args[1:] for m in getattr(item, "metadata", [item])]
        return _describe(args[0], [*metadata, *below])
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(arg, metadata) for arg in args)
    if origin is Literal:
        values = [repr(arg) for arg in args]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    if origin is list:
        return f"a list of {_plural(_describe(args[0], ()))}"
    if origin is tuple:
        return f"a list of {len(args)} {_plural(_describe(args[0], ()))}"
    if isinstance(kind, type) and issubclass(kind, Section):
        return f"a mapping with the keys {', '.join(kind.model_fields)}"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    word = "nothing (null)" if kind is type(None) else words.get(kind, "a mapping")
    return " ".join([word, *filter(None, [_bounds(metadata), _pattern(metadata)])])


def _plural(words: str) -> str:
    """'a number >= 0' -> 'numbers >= 0'; 'a string' -> 'strings'."""
    noun, _, tail = words.removeprefix("an ").removeprefix("a ").partition(" ")
    return f"{noun}s {tail}".rstrip()


def _bounds(metadata: Sequence[Any]) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = [
        f"{sign} {_plain(getattr(item, name))}"
        for name, sign in signs.items()
        for item in metadata
        if getattr(item, name, None) is not None
    ]
    return " and ".join(found)


def _pattern(metadata: Sequence[Any]) -> str:
    patterns = [item.pattern for item in metadata if getattr(item, "pattern", None) is not None]
    return f"that matches {patterns[0]}" if patterns else ""


def _plain(bound: Any) -> str:
    return "2^63" if bound == 2**63 else f"{bound:g}" if isinstance(bound, float) else str(bound)
