"""Plans: each step by example, and full coverage of source and target, told all at once."""

from typing import Any

import numpy as np
import pytest

from everstep.checkpoint.convert.converted import Converted
from everstep.checkpoint.convert.errors import ConversionError
from everstep.checkpoint.convert.plan import plan_extract, plan_union, with_dtype
from everstep.checkpoint.convert.source import read_box
from everstep.checkpoint.convert.spec import Spec
from everstep.checkpoint.errors import CheckpointError
from everstep.checkpoint.layout import TensorSpec
from tests.support.conversions import Arrays, ArraySource, carried_out


def spec_of(*rules: dict[str, Any], **more: Any) -> Spec:
    return Spec.model_validate({"name": "test", "rules": list(rules), **more})


def union(spec: Spec, stored: Arrays, **wanted: tuple[int, ...]) -> Arrays:
    inventory = {n: TensorSpec(n, "F32", shape) for n, shape in wanted.items()} or None
    return carried_out(plan_union(spec, ArraySource(stored).tensors, inventory), stored)


def floats(*shape: int) -> Any:
    return np.arange(np.prod(shape), dtype="<f4").reshape(shape)


QKV = {"logical": ["q", "k", "v"], "stored": "qkv", "transposed": True}


def test_a_transposed_fused_matrix() -> None:
    stored = {"qkv": floats(3, 8)}
    found = union(spec_of(QKV | {"fused": {"dim": 0, "sizes": [4, 2, 2]}}), stored)
    np.testing.assert_array_equal(found["k"], stored["qkv"].T[4:6])
    assert found["q"].shape == (4, 3)


def test_flat_ranges_of_ranks_with_padding() -> None:
    rule = {"logical": ["a", "b"], "stored": "r{rank#}", "over": "rank", "flat": {}}
    stored = {"r1": floats(6) + 6, "r0": floats(6)}
    found = union(spec_of(rule), stored, a=(2, 3), b=(1, 4))
    np.testing.assert_array_equal(found["a"], floats(6).reshape(2, 3))
    np.testing.assert_array_equal(found["b"], [[6, 7, 8, 9]])


def test_shards_are_in_the_order_of_their_numbers_not_of_their_names() -> None:
    rule = {"logical": "a", "stored": "r{rank#}", "over": "rank", "sharded": 0}
    stored = {f"r{i}": np.full((1,), i, "<f4") for i in (10, 9, *range(9))}
    assert union(spec_of(rule), stored)["a"].tolist() == list(range(11))


def test_replicas_that_differ_are_refused() -> None:
    rule = {"logical": "a", "stored": "r{rank#}", "over": "rank", "replicated": True}
    assert union(spec_of(rule), {"r0": floats(4), "r1": floats(4)})["a"].tolist() == [0, 1, 2, 3]
    with pytest.raises(ConversionError, match="its replicas 'r0' and 'r1' differ"):
        union(spec_of(rule), {"r0": floats(4), "r1": floats(4) + 1})


def test_means() -> None:
    rule = {"logical": "a", "stored": "r{rank#}", "over": "rank", "average": True}
    assert union(spec_of(rule), {"r0": floats(3), "r1": floats(3) * 3})["a"].tolist() == [0, 2, 4]
    numbers = {"r0": np.arange(3), "r1": np.arange(3)}
    with pytest.raises(ConversionError, match="there is no mean of I64"):
        union(spec_of(rule), numbers)


def test_whatever_is_missing_or_too_much_is_told_at_once() -> None:
    spec = spec_of({"logical": "{rest*}", "stored": "s.{rest*}"})
    stored = ArraySource({"s.a": floats(2), "s.b": floats(2), "t": floats(1), "s.n": np.arange(2)})
    wanted = {
        "a": TensorSpec("a", "F32", (3,)),
        "c": TensorSpec("c", "F32", (1,)),
        "n": TensorSpec("n", "F32", (2,)),
    }
    with pytest.raises(ConversionError) as caught:
        plan_union(spec, stored.tensors, wanted, where="dir")
    assert caught.value.problems == [
        "no rule uses its tensor 't'",
        "it lacks 'c'",
        "its 'b' is not wanted",
        "'a' has shape [2], expected [3]",
        "'n' is I64, expected F32",
    ]
    assert "nothing was written" in str(caught.value)


def test_what_is_dropped_is_dropped_on_purpose() -> None:
    spec = spec_of(
        {"logical": "{rest*}", "stored": "s.{rest*}"},
        drop={"stored": "{rest*}.freq", "logical": ["optimizer.{rest*}"]},
    )
    stored = ArraySource({"s.a": floats(2), "s.freq": floats(1), "x": floats(1)})
    plan = plan_union(spec, stored.tensors, drop=["x"])
    assert list(plan.tensors) == ["a"]
    assert plan.dropped == ("s.freq", "x")
    logical = ArraySource({"a": floats(2), "optimizer.a": floats(2)})
    assert plan_extract(spec, logical.tensors).dropped == ("optimizer.a",)


@pytest.mark.parametrize(
    ("rules", "names", "message"),
    [
        (
            [{"logical": "a", "stored": "s"}, {"logical": "b.{x}", "stored": "{x}"}],
            ["s"],
            "two rules use",
        ),
        (
            [{"logical": "a", "stored": "s"}, {"logical": "a", "stored": "t"}],
            ["s", "t"],
            "made twice",
        ),
        (
            [{"logical": "a", "stored": "r{i#}", "over": "i", "sharded": 0}],
            ["r0", "r2"],
            "fragments [0, 2] of 'r{i#}' are not 0 to 1",
        ),
        (
            [{"logical": "a", "stored": "r{i#}", "over": "i", "sharded": 0, "parts": 2}],
            ["r0"],
            "fragments [0] of 'r{i#}' are not 0 to 1",
        ),
        (
            [{"logical": "a", "stored": "r{i#}", "over": "i", "sharded": 0}],
            ["r0", "r1", "r01"],
            "'r01' and 'r1' have the same number",
        ),
        ([{"logical": "a", "stored": "s", "transposed": [0, 2]}], ["s"], "is no order of 1 dims"),
        ([{"logical": "a", "stored": "s", "padded": {"dim": 0}}], ["s"], "say padded.size"),
        ([{"logical": ["a", "b"], "stored": "s", "fused": {"dim": 0}}], ["s"], "say fused.sizes"),
        (
            [{"logical": "a", "stored": "r{i#}", "over": "i", "flat": {}}],
            ["r0"],
            "say flat.shapes",
        ),
        (
            [{"logical": ["a", "b"], "stored": "s", "fused": {"dim": 0, "sizes": [1, 2]}}],
            ["s"],
            "does not split into [1, 2]",
        ),
        (
            [{"logical": "a", "stored": "s", "padded": {"dim": 0, "to": 9, "size": 1}}],
            ["s"],
            "is not padded to 9",
        ),
    ],
)
def test_sources_that_do_not_fit(rules: list[Any], names: list[str], message: str) -> None:
    source = ArraySource({name: floats(2) for name in names})
    with pytest.raises(ConversionError) as caught:
        plan_union(spec_of(*rules), source.tensors)
    assert message in str(caught.value)


def test_an_extract_needs_all_that_is_fused_and_the_number_of_parts() -> None:
    with pytest.raises(ConversionError, match="'qkv' needs k and v"):
        plan_extract(spec_of(QKV | {"fused": {"dim": 0}}), ArraySource({"q": floats(2, 2)}).tensors)
    rule = {"logical": "a", "stored": "r{i#}", "over": "i", "sharded": 0}
    with pytest.raises(ConversionError, match="say parts, the number of fragments"):
        plan_extract(spec_of(rule), ArraySource({"a": floats(4)}).tensors)


def test_casts_are_of_floating_point_tensors_only() -> None:
    arrays = {"a": np.array([1.00390625, -3.0, np.inf], "<f4"), "n": np.arange(3)}
    source = ArraySource(arrays)
    plan = with_dtype(
        plan_union(spec_of({"logical": "{x}", "stored": "{x}"}), source.tensors), "BF16"
    )
    assert {n: t.dtype for n, t in plan.tensors.items()} == {"a": "BF16", "n": "I64"}
    converted = Converted(plan, source)
    bits = read_box(converted, "a", converted.tensors["a"].whole).view("<u2")
    assert [f"{b:04x}" for b in bits] == ["3f80", "c040", "7f80"]
    with pytest.raises(CheckpointError, match="dtype: got 'bf16', expected one of F64, F32"):
        with_dtype(plan, "bf16")
