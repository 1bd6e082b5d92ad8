"""Names of tensors as templates that both match and render (pure).

``{part}`` stands for one component of a dotted name, ``{rest*}`` for any text, ``{layer#}`` for a
number, ``{rank#2}`` for a number of at least two digits. Everything else stands for itself.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from everstep.checkpoint.convert.errors import SpecError

_FIELD = re.compile(r"\{([a-z_][a-z0-9_]*)(\*|#[0-9]?)?\}")


@dataclass(frozen=True)
class Template:
    """A pattern of names; raises SpecError when it is malformed."""

    text: str

    def __post_init__(self) -> None:
        rest = _FIELD.sub("", self.text)
        names = self.captures
        if not self.text or "{" in rest or "}" in rest or len(set(names)) != len(names):
            raise SpecError(
                f"name pattern {self.text!r} is malformed, expected text with fields such as "
                "{part}, {rest*} or {layer#}, each name once"
            )

    @property
    def captures(self) -> tuple[str, ...]:
        """Names of the fields, in order."""
        return tuple(match[1] for match in _FIELD.finditer(self.text))

    def is_number(self, name: str) -> bool:
        """Whether a field stands for numbers only."""
        return any(m[1] == name and m[2] not in (None, "*") for m in _FIELD.finditer(self.text))

    def match(self, name: str) -> dict[str, str] | None:
        """The value of every field in a name, or None."""
        found = self._pattern.fullmatch(name)
        return None if found is None else found.groupdict()

    def render(self, values: Mapping[str, str]) -> str:
        """The name with these values; numbers get the leading zeros that their field asks for."""

        def value(match: re.Match[str]) -> str:
            digits = (match[2] or "")[1:]
            return values[match[1]].zfill(int(digits)) if digits else values[match[1]]

        return _FIELD.sub(value, self.text)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        text, end = "", 0
        for match in _FIELD.finditer(self.text):
            kind = match[2] or ""
            body = {"": r"[^.]+", "*": r".+"}.get(kind, rf"[0-9]{{{kind[1:] or 1},}}")
            text += f"{re.escape(self.text[end : match.start()])}(?P<{match[1]}>{body})"
            end = match.end()
        return re.compile(text + re.escape(self.text[end:]), re.DOTALL)
