"""From a spec and the tensors that there are, to views of the tensors that are wanted (pure).

A plan is checked as a whole before a byte is read: every wanted tensor is made exactly once, and
every tensor of the source is used, or dropped on purpose.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from everstep.checkpoint.convert import view as v
from everstep.checkpoint.convert.cast import can_cast, check_float
from everstep.checkpoint.convert.errors import ConversionError
from everstep.checkpoint.convert.spec import Flat, Padded, Rule, Spec
from everstep.checkpoint.convert.template import Template
from everstep.checkpoint.convert.view import View
from everstep.checkpoint.layout import TensorSpec

Inventory = Mapping[str, TensorSpec]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """How each tensor is made."""

    views: Mapping[str, View]
    tensors: Inventory
    """What is made; a dtype that differs from the view's asks for a cast."""
    dropped: tuple[str, ...]
    """Source tensors that are left out on purpose."""


def plan_union(
    spec: Spec,
    stored: Inventory,
    wanted: Inventory | None = None,
    *,
    drop: Sequence[str] = (),
    where: str = "the source",
) -> Plan:
    """The logical tensors that stored ones make.

    Args:
        spec: how.
        stored: the tensors of the source.
        wanted: exactly the tensors to make; None: whatever the spec makes.
        drop: further stored names to leave out.
        where: names the source in errors.

    Raises:
        ConversionError: everything that does not fit, together.
    """
    found = _Findings(wanted)
    left = _without_dropped(stored, spec.drop.stored, drop)
    for rule in spec.rules:
        for values, parts in _groups(rule, left, found):
            names = [template.render(values) for template in rule.logical]
            found.use(part.name for part in parts.values())
            try:
                _check_parts(rule, list(parts), wanted=None)
                shapes = found.shapes_of(names)
                views = _union(rule, [parts[number] for number in sorted(parts)], shapes)
            except ValueError as error:
                found.problems.append(f"{' and '.join(names)}: {error}")
            else:
                found.add(dict(zip(names, views, strict=True)))
    return found.plan(where, stored, left)


def plan_extract(
    spec: Spec,
    logical: Inventory,
    wanted: Inventory | None = None,
    *,
    drop: Sequence[str] = (),
    where: str = "the source",
) -> Plan:
    """The stored tensors that logical ones make; the inverse of ``plan_union``, same arguments."""
    found = _Findings(wanted)
    left = _without_dropped(logical, spec.drop.logical, drop)
    for rule in spec.rules:
        for values in _sightings(rule.logical, left):
            names = [template.render(values) for template in rule.logical]
            missing = [name for name in names if name not in left]
            if missing:
                found.problems.append(f"{rule.stored.text!r} needs {' and '.join(missing)}")
                continue
            found.use(names)
            numbers = range(rule.parts or 1)
            stored = [rule.stored.render(values | _numbered(rule, i)) for i in numbers]
            try:
                _check_parts(rule, list(numbers), wanted=rule.parts)
                whole = _extract(rule, [left[name] for name in names])
                views = _fragments(rule, whole, len(stored))
            except ValueError as error:
                found.problems.append(f"{' and '.join(names)}: {error}")
            else:
                found.add(dict(zip(stored, views, strict=True)))
    return found.plan(where, logical, left)


def with_dtype(plan: Plan, dtype: str | None) -> Plan:
    """The same plan with all floating-point tensors in one dtype; None changes nothing.

    Raises:
        CheckpointError: there is no such dtype to convert to.
    """
    if dtype is not None:
        check_float(dtype)
    tensors = {
        name: replace(t, dtype=dtype) if dtype and can_cast(t.dtype, dtype) else t
        for name, t in plan.tensors.items()
    }
    return replace(plan, tensors=tensors)


class _Findings:
    """What was made and used so far, and everything that was wrong with it."""

    def __init__(self, wanted: Inventory | None) -> None:
        self.problems: list[str] = []
        self._wanted = wanted
        self._views: dict[str, View] = {}
        self._used: set[str] = set()

    def use(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._used:
                self.problems.append(f"two rules use {name!r}")
            self._used.add(name)

    def add(self, views: Mapping[str, View]) -> None:
        for name, view in views.items():
            if name in self._views:
                self.problems.append(f"{name!r} is made twice")
            self._views[name] = view

    def shapes_of(self, names: Sequence[str]) -> list[Shape] | None:
        """Shapes of wanted tensors; None where it is not known what is wanted."""
        if self._wanted is None:
            return None
        return [self._wanted[name].shape for name in names if name in self._wanted]

    def plan(self, where: str, source: Inventory, left: Inventory) -> Plan:
        self.problems += [
            f"no rule uses its tensor {name!r}" for name in sorted(left.keys() - self._used)
        ]
        made = {n: TensorSpec(n, view.dtype, view.shape) for n, view in self._views.items()}
        if self._wanted is not None:
            self._compare(made, self._wanted)
            made = {name: self._wanted.get(name, tensor) for name, tensor in made.items()}
        for name, view in self._views.items():
            if sum(piece.box.size for piece in view.pieces) != math.prod(view.shape):
                self.problems.append(f"{name!r} is not covered exactly once")
        if self.problems:
            raise ConversionError(where, self.problems)
        dropped = tuple(sorted(source.keys() - left.keys()))
        return Plan(self._views, dict(sorted(made.items())), dropped)

    def _compare(self, made: Inventory, wanted: Inventory) -> None:
        self.problems += [f"it lacks {name!r}" for name in sorted(wanted.keys() - made.keys())]
        self.problems += [
            f"its {name!r} is not wanted" for name in sorted(made.keys() - wanted.keys())
        ]
        for name in sorted(made.keys() & wanted.keys()):
            have, want = made[name], wanted[name]
            if have.shape != want.shape:
                self.problems.append(
                    f"{name!r} has shape {list(have.shape)}, expected {list(want.shape)}"
                )
            elif have.dtype != want.dtype and not can_cast(have.dtype, want.dtype):
                self.problems.append(f"{name!r} is {have.dtype}, expected {want.dtype}")


def _without_dropped(
    source: Inventory, patterns: Sequence[Template], names: Sequence[str]
) -> dict[str, TensorSpec]:
    return {
        name: tensor
        for name, tensor in source.items()
        if name not in names and not any(p.match(name) is not None for p in patterns)
    }


def _groups(
    rule: Rule, stored: Inventory, found: _Findings
) -> Iterable[tuple[dict[str, str], dict[int, TensorSpec]]]:
    """Field values -> number -> fragment, for all stored tensors that a rule matches."""
    groups: dict[tuple[tuple[str, str], ...], dict[int, TensorSpec]] = {}
    for name, tensor in stored.items():
        values = rule.stored.match(name)
        if values is None:
            continue
        number = int(values.pop(rule.over)) if rule.over else 0
        parts = groups.setdefault(tuple(sorted(values.items())), {})
        if number in parts:
            found.problems.append(f"{name!r} and {parts[number].name!r} have the same number")
        parts[number] = tensor
    return [(dict(values), parts) for values, parts in groups.items()]


def _sightings(templates: Sequence[Template], logical: Inventory) -> list[dict[str, str]]:
    """The distinct field values under which any of the templates matches."""
    seen: dict[tuple[tuple[str, str], ...], None] = {}
    for name in logical:
        for template in templates:
            values = template.match(name)
            if values is not None:
                seen.setdefault(tuple(sorted(values.items())))
    return [dict(values) for values in seen]


def _numbered(rule: Rule, number: int) -> dict[str, str]:
    return {rule.over: str(number)} if rule.over else {}


def _check_parts(rule: Rule, numbers: Sequence[int], wanted: int | None) -> None:
    if rule.over is None:
        return
    if wanted is None and rule.parts is None and not numbers:
        raise ValueError("there are no fragments")
    expected = rule.parts or len(numbers)
    if sorted(numbers) != list(range(expected)):
        raise ValueError(
            f"fragments {sorted(numbers)} of {rule.stored.text!r} are not 0 to {expected - 1}"
        )


def _union(rule: Rule, parts: Sequence[TensorSpec], shapes: list[Shape] | None) -> list[View]:
    """The logical views of a rule; ``shapes`` are those of the wanted tensors, if known."""
    if shapes is not None and len(shapes) != len(rule.logical):
        shapes = None  # some of them are not wanted: told with everything else
    views = [v.whole(part) for part in parts]
    if rule.flat is not None:
        flat = v.concat([v.flatten(view) for view in views], 0)
        return _unflatten(rule.flat, flat, shapes)
    view = views[0]
    if rule.sharded is not None:
        view = v.concat(views, rule.sharded)
    elif rule.over is not None:
        view = v.combine(views, "mean" if rule.average else "same")
    order = _order(rule, len(view.shape))
    if rule.padded is not None:
        view = _strip(rule.padded, rule, view, order, shapes)
    view = v.permute(view, order)
    if rule.fused is None:
        return [view]
    dim, sizes = rule.fused.dim, rule.fused.sizes
    if sizes is None:
        if shapes is None:
            raise ValueError("say fused.sizes, as it is not known what is wanted")
        if any(dim >= len(shape) for shape in shapes):
            raise ValueError(f"a tensor of shape {list(shapes[0])} has no dim {dim}")
        sizes = tuple(shape[dim] for shape in shapes)
    return v.split(view, dim, sizes)


def _strip(
    padded: Padded, rule: Rule, view: View, order: Sequence[int], shapes: list[Shape] | None
) -> View:
    dim, size = padded.dim, padded.size
    if dim >= len(view.shape):
        raise ValueError(f"a tensor of shape {list(view.shape)} has no dim {dim}")
    if padded.to not in (None, view.shape[dim]):
        raise ValueError(f"shape {list(view.shape)} is not padded to {padded.to}")
    if size is None:
        if shapes is None or any(len(shape) != len(order) for shape in shapes):
            raise ValueError("say padded.size, as it is not known what is wanted")
        logical_dim = list(order).index(dim)
        joined = rule.fused is not None and rule.fused.dim == logical_dim
        lengths = [shape[logical_dim] for shape in shapes]
        size = sum(lengths) if joined else lengths[0]
    return v.strip(view, dim, size)


def _unflatten(how: Flat, flat: View, shapes: list[Shape] | None) -> list[View]:
    known = list(how.shapes) if how.shapes is not None else shapes
    if known is None:
        raise ValueError("say flat.shapes, as it is not known what is wanted")
    sizes = [math.prod(shape) for shape in known]
    stripped = v.strip(flat, 0, sum(sizes))
    return [
        v.unflatten(view, shape)
        for view, shape in zip(v.split(stripped, 0, sizes), known, strict=True)
    ]


def _extract(rule: Rule, tensors: Sequence[TensorSpec]) -> View:
    """The stored tensor of a rule, before it is cut into fragments."""
    views = [v.whole(tensor) for tensor in tensors]
    if rule.flat is not None:
        if rule.flat.shapes is not None:
            _expect([t.shape for t in tensors], list(rule.flat.shapes), "flat.shapes")
        return v.concat([v.flatten(view) for view in views], 0)
    view = views[0]
    if rule.fused is not None:
        view = v.concat(views, rule.fused.dim)
        if rule.fused.sizes is not None:
            _expect([t.shape[rule.fused.dim] for t in tensors], [*rule.fused.sizes], "fused.sizes")
    order = _order(rule, len(view.shape))
    view = v.permute(view, [order.index(d) for d in range(len(order))])
    if rule.padded is not None:
        dim, to, size = rule.padded.dim, rule.padded.to, rule.padded.size
        if size is not None and dim < len(view.shape):
            _expect(view.shape[dim], size, "padded.size")
        if to is not None:
            view = v.pad(view, dim, to)
    return view


def _fragments(rule: Rule, view: View, parts: int) -> list[View]:
    """Inverse of how a union combines fragments; cut evenly, as ``torch.chunk`` does."""
    if rule.over is None:
        return [view]
    if rule.parts is None:
        raise ValueError(f"say parts, the number of fragments of {rule.stored.text!r}")
    if rule.flat is not None:
        width = -(-view.shape[0] // parts)
        return v.split(v.pad(view, 0, width * parts), 0, [width] * parts)
    if rule.sharded is None:
        return [view] * parts
    dim = rule.sharded
    if dim >= len(view.shape):
        raise ValueError(f"a tensor of shape {list(view.shape)} has no dim {dim}")
    extent = view.shape[dim]
    width = -(-extent // parts)
    sizes = [min((i + 1) * width, extent) - min(i * width, extent) for i in range(parts)]
    return v.split(view, dim, sizes)


def _order(rule: Rule, dims: int) -> list[int]:
    if rule.transposed is None:
        return list(range(dims))
    if rule.transposed is True:
        return list(range(dims))[::-1]
    if sorted(rule.transposed) != list(range(dims)):
        raise ValueError(f"transposed {rule.transposed} is no order of {dims} dims")
    return rule.transposed


def _expect(found: object, said: object, what: str) -> None:
    if found != said:
        raise ValueError(f"{what} is {said}, but it is {found}")
