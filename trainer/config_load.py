"""From a YAML file and command-line overrides to a checked ``RunConfig``, and back to YAML.

Everything that can be wrong with a config is a ConfigError of one sentence: where (file and
line, or command line), which dotted key, what it got, what is allowed.
"""

import difflib
import importlib.resources
import re
from collections.abc import Mapping, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from everstep.trainer import config_schema as schema
from everstep.trainer.config import RunConfig, Section
from everstep.trainer.config_yaml import dump_yaml, parse_document, parse_scalar
from everstep.trainer.errors import ConfigError

COMMAND_LINE = "command line"
_LONGEST_VALUE = 60
_SECRET = re.compile("secret|token|password|passwd|passphrase|key|credential|auth|sas", re.I)


def load_config(ref: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Load a run from a YAML file or a packaged config, then apply ``key.subkey=value`` overrides.

    ``ref`` is the path of a file or the name of a packaged config ("demo").
    Raises ConfigError for a missing file, an unknown key or a value that is not allowed.
    """
    source = find_config(ref)
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source} cannot be read as UTF-8 text: {error}") from None
    return parse_config(text, _shown(source), overrides)


def parse_config(text: str, source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Like ``load_config`` for YAML text at hand; ``source`` names it in errors."""
    document = parse_document(text, source)
    places = {key: f"{source}, line {line}" for key, line in document.lines.items()}
    values = dict(_without_empty_sections(document.values))
    for override in overrides:
        key, value = _parse_override(override)
        if _assign(values, key, value):
            places = {k: p for k, p in places.items() if k != key and not k.startswith(f"{key}.")}
            places[key] = COMMAND_LINE
    return _validate(values, places, source)


def dump_config(config: RunConfig, *, mask_secrets: bool = False) -> str:
    """YAML text with every field, which ``parse_config`` reads back to an equal object.

    With ``mask_secrets``, for eyes and logs: what ``storage_options`` keep under a name that
    sounds secret is ``***``, unless it only names an environment variable.
    """
    values = config.model_dump()
    if mask_secrets and isinstance(values["data"]["source"], list):
        for entry in values["data"]["source"]:
            if isinstance(entry, dict):
                entry["storage_options"] = _masked(entry["storage_options"])
    return dump_yaml(values)


def _masked(options: dict[str, Any]) -> dict[str, Any]:
    def mask(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return _masked(value)
        from_environment = isinstance(value, str) and value.startswith("$")
        secret = _SECRET.search(key) is not None and not from_environment
        return "***" if secret else value

    return {key: mask(str(key), value) for key, value in options.items()}


def packaged_configs() -> dict[str, Traversable]:
    """Name -> file of every config that is shipped with everstep, sorted by name."""
    folder = importlib.resources.files("everstep") / "configs"
    found = [entry for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    return {
        entry.name.removesuffix(".yaml"): entry for entry in sorted(found, key=lambda e: e.name)
    }


def find_config(ref: str) -> Traversable:
    """The file that ``ref`` means: a path first, then a packaged name. Raises ConfigError."""
    path = Path(ref).expanduser()
    if path.is_file():
        return path
    packaged = packaged_configs()
    name = ref.removesuffix(".yaml")
    if name in packaged:
        return packaged[name]
    if path.is_dir():
        raise ConfigError(f"{ref} is a folder, expected a YAML file or a packaged config")
    near = difflib.get_close_matches(Path(name).name, packaged, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"packaged are {', '.join(packaged)}"
    raise ConfigError(f"no config {ref!r}: neither a file nor a packaged config; {hint}")


def _shown(source: Traversable) -> str:
    """A packaged config by its name, a file of the user by the path as it was given."""
    packaged = packaged_configs().get(source.name.removesuffix(".yaml"))
    return f"packaged config {source.name}" if source == packaged else str(source)


def _without_empty_sections(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """A section with all its entries commented out is empty, and YAML reads that as null."""
    empty = {
        name
        for name, field in RunConfig.model_fields.items()
        if name in values and values[name] is None and schema.section_of(field) is not None
    }
    return {key: {} if key in empty else value for key, value in values.items()}


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(
            f"{COMMAND_LINE}: {override!r} is not an override, expected key=value such as "
            "train.steps=100"
        )
    path = tuple(key.split("."))
    if schema.field_at(path) is None and not schema.takes_any_key(path):
        raise ConfigError(f"{COMMAND_LINE}: {_unknown(path)}")
    try:
        return key, parse_scalar(text)
    except ValueError as error:
        raise ConfigError(f"{COMMAND_LINE}: {key}: {text!r} is not valid YAML: {error}") from None


def _assign(values: dict[str, Any], key: str, value: Any) -> bool:
    """Set a dotted key in nested mappings; False where something else stands in the way."""
    *parents, last = key.split(".")
    for parent in parents:
        below = values.setdefault(parent, {})
        if not isinstance(below, dict):
            return False
        values = below
    values[last] = value
    return True


def _validate(values: dict[str, Any], places: Mapping[str, str], source: str) -> RunConfig:
    problems = _misplaced_booleans(values, RunConfig, ())
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        problems |= _problems(error, values)
    if problems:
        (path, problem), *others = problems.items()
        also = ", ".join(".".join(other) for other, _ in others)
        more = f" (also wrong: {also})" if also else ""
        raise ConfigError(f"{_place(path, places, source)}: {problem}{more}")
    return config


def _problems(error: ValidationError, values: Mapping[str, Any]) -> dict[schema.Path, str]:
    """One sentence per wrong key, unknown keys first: they often explain the others."""
    problems: dict[schema.Path, str] = {}
    meant: set[str | None] = set()  # keys that unknown ones were probably meant to be
    found = error.errors(include_url=False)
    for item in sorted(found, key=lambda e: e["type"] not in ("extra_forbidden", "invalid_key")):
        path = schema.field_path(item["loc"])
        if item["type"] in ("extra_forbidden", "invalid_key"):
            path = tuple(map(str, item["loc"][: len(path) + 1]))
            problems.setdefault(path, _unknown(path))
            meant.add(schema.nearest_key(path))
        elif item["type"] == "value_error":  # raised by a validator of a section, which names keys
            problems.setdefault(path, str(item["ctx"]["error"]))
        elif item["type"] == "missing" and len(item["loc"]) == len(path):
            path = _first_required(path)
            dotted = ".".join(path)
            if dotted not in meant:
                problems.setdefault(path, f"{dotted} is missing, expected {_allowed(path)}")
        else:
            problems.setdefault(path, _bad_value(path, _value_at(values, path)))
    return problems


def _misplaced_booleans(
    values: Mapping[str, Any], section: type[Section], above: schema.Path
) -> dict[schema.Path, str]:
    """true and false where no boolean is allowed; pydantic would take them for 1 and 0."""
    problems: dict[schema.Path, str] = {}
    for name, field in section.model_fields.items():
        value, path = values.get(name), (*above, name)
        below = schema.section_of(field)
        if below is not None and isinstance(value, dict):
            problems |= _misplaced_booleans(value, below, path)
        elif below is None and field.annotation is not bool:
            items = value if isinstance(value, list) else [value]
            if any(isinstance(item, bool) for item in items):
                problems[path] = _bad_value(path, value)
    return problems


def _bad_value(path: schema.Path, value: Any) -> str:
    shown = "null" if value is None else repr(value)
    if isinstance(value, bool):
        shown = shown.lower()
    if len(shown) > _LONGEST_VALUE:
        shown = f"{shown[: _LONGEST_VALUE - 3]}..."
    allowed = _allowed(path)
    hint = ""
    if allowed.startswith("a string") and isinstance(value, (bool, int, float)):
        hint = "; put it in quotes to make it a string"
    elif allowed.startswith("a list of strings") and isinstance(value, str):
        hint = f"; write [{value}]"
    return f"{'.'.join(path)}: got {shown}, expected {allowed}{hint}"


def _allowed(path: schema.Path) -> str:
    field = schema.field_at(path)
    return schema.describe(field) if field else f"the sections {', '.join(RunConfig.model_fields)}"


def _unknown(path: schema.Path) -> str:
    dotted = ".".join(path)
    for length in range(1, len(path)):
        above = schema.field_at(path[:length])
        if above is not None and schema.section_of(above) is None:
            return f"unknown key {dotted}: {'.'.join(path[:length])} is a value, not a section"
    nearest = schema.nearest_key(path)
    if nearest is not None:
        return f"unknown key {dotted}; did you mean {nearest}?"
    section = schema.field_at(path[:-1])
    names = (schema.section_of(section) if section else None) or RunConfig
    return f"unknown key {dotted}; the keys there are {', '.join(names.model_fields)}"


def _first_required(path: schema.Path) -> schema.Path:
    """Descend from a missing section to its first field that has no default."""
    field = schema.field_at(path)
    section = schema.section_of(field) if field else None
    for name, below in section.model_fields.items() if section else ():
        if below.is_required():
            return _first_required((*path, name))
    return path


def _value_at(values: Mapping[str, Any], path: schema.Path) -> Any:
    value: Any = values
    for part in path:
        value = value[part] if isinstance(value, dict) else None
    return value


def _place(path: schema.Path, places: Mapping[str, str], source: str) -> str:
    """Where the key was written, else the section around it, else the whole source."""
    dotted = ".".join(path)
    below = [place for key, place in places.items() if key.startswith(f"{dotted}.")]
    if COMMAND_LINE in below:  # a validator of a whole section, in which an override took part
        return COMMAND_LINE
    for length in range(len(path), 0, -1):
        place = places.get(".".join(path[:length]))
        if place is not None:
            return place
    return source
