"""The conversion spec: how tensors as they are stored elsewhere make our logical tensors (pure).

A spec is a YAML mapping. Each of its ``rules`` relates stored tensors to logical ones, and is read
in both directions: *union* makes the logical tensors from the stored ones (import), *extract* the
stored ones from the logical ones (export)::

    name: example
    rules:
      - {logical: "model.{layer#}.down.weight", stored: "h.{layer#}.mlp.w2", transposed: true}
      - logical: ["model.{layer#}.q.weight", "model.{layer#}.k.weight", "model.{layer#}.v.weight"]
        stored: "h.{layer#}.qkv"
        fused: {dim: 0, sizes: [64, 32, 32]}
      - {logical: embed, stored: "rank_{rank#}.embed", over: rank, sharded: 0,
         padded: {dim: 0, to: 128, size: 100}}
    drop: {stored: ["{rest*}.inv_freq"], logical: ["optimizer.{rest*}"]}

The steps of a rule, in the order of a union: the fragments that ``over`` numbers are combined
(``sharded`` along a dim, ``replicated``, ``average``, or ``flat``), padding is stripped, dims are
``transposed``, and what was ``fused`` is split. Names are templates, see ``template``.

Source: the operations are those of Universal Checkpointing, arXiv 2406.18820.
"""

import difflib
import importlib.resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from everstep.checkpoint.convert.errors import SpecError
from everstep.checkpoint.convert.template import Template

MAX_SPEC_BYTES = 2**20
Natural = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[int, Field(ge=1, strict=True)]
Order = Annotated[list[Natural], Field(min_length=1)]


def _template(value: Any) -> Any:
    if isinstance(value, Template):
        return value
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no name pattern, expected text")
    try:
        return Template(value)
    except SpecError as error:
        raise ValueError(str(error)) from None


Pattern = Annotated[Template, BeforeValidator(_template)]
Patterns = Annotated[
    tuple[Pattern, ...], BeforeValidator(lambda v: v if isinstance(v, list | tuple) else [v])
]


class _Section(BaseModel):
    """Immutable; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class Padded(_Section):
    """The stored tensor is longer than the logical one along a dim."""

    dim: Natural
    to: Positive | None = None
    """Stored length; None: whatever it is (a union), the logical one (an extract)."""
    size: Positive | None = None
    """Logical length; None: that of the wanted tensor."""


class Fused(_Section):
    """The stored tensor is several logical ones, joined along a dim."""

    dim: Natural
    sizes: tuple[Positive, ...] | None = None
    """Length of each along ``dim``; None: those of the wanted tensors."""


class Flat(_Section):
    """The stored tensors are consecutive ranges of the logical ones, flattened and joined.

    What is left after the last logical tensor is padding.
    """

    shapes: tuple[tuple[Natural, ...], ...] | None = None
    """Shape of each logical tensor; None: those of the wanted tensors."""


class Rule(_Section):
    """One relation between stored and logical tensors."""

    logical: Patterns
    stored: Pattern
    over: str | None = None
    """The field of ``stored`` that numbers the fragments of one tensor, from 0."""
    parts: Positive | None = None
    """How many fragments there are; None: as many as are found. An extract needs it."""
    sharded: Natural | None = None
    """Fragments follow each other along this dim."""
    replicated: Literal[True] | None = None
    """Fragments are the same tensor; a reader that finds them to differ refuses them."""
    average: Literal[True] | None = None
    """The tensor is the mean of the fragments."""
    flat: Flat | None = None
    padded: Padded | None = None
    transposed: Literal[True] | Order | None = None
    """Logical dim d is stored dim transposed[d]; true: dims in reverse order."""
    fused: Fused | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Rule":
        ways = [w for w in ("sharded", "replicated", "average", "flat") if self._has(w)]
        if len(ways) > 1:
            raise ValueError(f"{' and '.join(ways)} exclude each other")
        if (self.over is None) != (not ways):
            raise ValueError(
                "over, the field that numbers fragments, goes with one of sharded, replicated, "
                "average and flat"
            )
        if self.over is not None and not self.stored.is_number(self.over):
            raise ValueError(f"over: {self.stored.text!r} has no field {{{self.over}#}}")
        if self.flat and (self.padded or self.transposed or self.fused):
            raise ValueError("flat excludes padded, transposed and fused")
        if len(self.logical) > 1 and not (self.fused or self.flat):
            raise ValueError("several logical tensors need fused or flat")
        self._check_counts()
        names = {*self.stored.captures} - {self.over}
        for template in self.logical:
            if {*template.captures} != names:
                raise ValueError(
                    f"{template.text!r} and {self.stored.text!r} have different fields"
                )
        return self

    def _has(self, way: str) -> bool:
        return getattr(self, way) is not None

    def _check_counts(self) -> None:
        sizes = self.fused.sizes if self.fused else None
        shapes = self.flat.shapes if self.flat else None
        for what, given in (("fused.sizes", sizes), ("flat.shapes", shapes)):
            if given is not None and len(given) != len(self.logical):
                raise ValueError(
                    f"{what} has {len(given)} entries for {len(self.logical)} logical tensors"
                )


class Drop(_Section):
    """Tensors that are left out on purpose; wins over rules."""

    logical: Patterns = ()
    stored: Patterns = ()


class Spec(_Section):
    """A whole conversion spec."""

    name: str
    rules: Annotated[tuple[Rule, ...], Field(min_length=1)]
    drop: Drop = Drop()
    with_file: bool = False
    """Stored names are ``FILE/TENSOR`` (FILE without its suffix): for ranks that use same names."""


def parse_spec(text: str, source: str) -> Spec:
    """A spec from YAML text; ``source`` names the text in errors. Raises SpecError."""
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise SpecError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise SpecError(f"{source} is no conversion spec: expected a mapping with 'rules'")
    try:
        return Spec.model_validate(values)
    except ValidationError as error:
        # Unknown keys first: they often explain what is missing.
        found = error.errors(include_url=False)
        first, *more = sorted(found, key=lambda e: e["type"] != "extra_forbidden")
        place = ".".join(str(part) for part in first["loc"]) or "the spec"
        rest = f" (and {len(more)} more)" if more else ""
        raise SpecError(f"{source}: {place}: {_words(first)}{rest}") from None


def _words(error: ErrorDetails) -> str:
    """What is wrong with a value, or a key, of a spec."""
    match error["type"]:
        case "extra_forbidden":
            *above, key = (part for part in error["loc"] if isinstance(part, str))
            section = _SECTIONS.get(above[-1], Spec) if above else Spec
            near = difflib.get_close_matches(key, section.model_fields, n=1)
            known = f"known are {', '.join(section.model_fields)}"
            return f"unknown key; {f'did you mean {near[0]}?' if near else known}"
        case "missing":
            return "it is missing"
        case "value_error":
            return str(error["ctx"]["error"])
        case "model_type":
            return f"got {error['input']!r}, expected a mapping"
        case "tuple_type":
            return f"got {error['input']!r}, expected a list"
        case "too_short":
            return "the list is empty, expected at least one entry"
    what = error["msg"].removeprefix("Input should be ")
    return f"got {error['input']!r}, expected {what}"


_SECTIONS: dict[str, type[_Section]] = {
    "rules": Rule,
    "padded": Padded,
    "fused": Fused,
    "flat": Flat,
    "drop": Drop,
}
"""What the mapping below a key consists of."""


def load_spec(ref: str | Path) -> Spec:
    """The spec in a file, or the packaged one of a name. Raises SpecError."""
    path = Path(ref).expanduser()
    packaged = packaged_specs()
    try:
        if path.is_file():
            if path.stat().st_size > MAX_SPEC_BYTES:
                raise SpecError(f"{path} is larger than {MAX_SPEC_BYTES} bytes: no conversion spec")
            return parse_spec(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} cannot be read as UTF-8 text: {error}") from None
    if str(ref) in packaged:
        return packaged[str(ref)]
    raise SpecError(
        f"no conversion spec {str(ref)!r}: neither a file nor a packaged one; packaged are "
        f"{', '.join(packaged)}"
    )


def packaged_specs() -> dict[str, Spec]:
    """Every spec that is shipped, by name."""
    folder = importlib.resources.files("everstep.checkpoint.convert") / "specs"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {f.name.removesuffix(".yaml"): parse_spec(f.read_text("utf-8"), f.name) for f in files}
