"""Specs and name templates: what they accept, and what they say of what they do not."""

import pickle
from pathlib import Path

import pytest

from everstep.checkpoint.convert.errors import ConversionError, SpecError
from everstep.checkpoint.convert.spec import load_spec, packaged_specs, parse_spec
from everstep.checkpoint.convert.template import Template


def test_templates_match_and_render() -> None:
    template = Template("a.{layer#}.{part}.{rest*}.r{rank#2}")
    values = template.match("a.12.q.x.y.r07")
    assert values == {"layer": "12", "part": "q", "rest": "x.y", "rank": "07"}
    assert template.render(values | {"rank": "3"}) == "a.12.q.x.y.r03"
    for other in ("a.x.q.x.r07", "a.1.q.x.r7", "b.1.q.x.r07", "a.1.q.x.r07.z", "a.1.q.x.r07\n"):
        assert template.match(other) is None
    assert Template("a.b").match("aXb") is None


@pytest.mark.parametrize("text", ["", "a.{", "a.}", "{a}.{a}", "{A}", "{a+}", "{a#x}"])
def test_malformed_templates(text: str) -> None:
    with pytest.raises(SpecError, match="is malformed"):
        Template(text)


def test_packaged_specs() -> None:
    assert list(packaged_specs()) == ["everything", "llama", "model", "weights"]
    assert load_spec("llama").name == "llama"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "expected a mapping with 'rules'"),
        ("rules: [", "is not valid YAML"),
        ("name: x\nrules: []", "rules: the list is empty"),
        ("name: x\nrules: {}", "rules: got {}, expected a list"),
        ("name: x\nrules: [3]", "rules.0: got 3, expected a mapping"),
        ("name: x\nrules: [{logical: a}]", "rules.0.stored: it is missing"),
        (
            "name: x\nrules: [{logical: a, stored: b, transpose: true}]",
            "rules.0.transpose: unknown key; did you mean transposed?",
        ),
        (
            "name: x\nrules: [{logical: a, stored: b, fused: {dim: 0, by: 3}}]",
            "rules.0.fused.by: unknown key; known are dim, sizes",
        ),
        ("name: x\nrule: []", "my.yaml: rule: unknown key; did you mean rules? (and 1 more)"),
        (
            "name: x\ndrop: {loical: []}\nrules: []",
            "drop.loical: unknown key; did you mean logical",
        ),
        ("name: x\nrules: [{logical: 'a.{', stored: b}]", "'a.{' is malformed"),
        ("name: x\nrules: [{logical: 3, stored: b}]", "3 is no name pattern"),
        ("name: x\nrules: [{logical: 'a.{i}', stored: b}]", "have different fields"),
        ("name: x\nrules: [{logical: [a, c], stored: b}]", "need fused or flat"),
        ("name: x\nrules: [{logical: a, stored: 'b.{r#}', sharded: 0}]", "over, the field"),
        ("name: x\nrules: [{logical: a, stored: 'b.{r#}', over: r}]", "over, the field"),
        (
            "name: x\nrules: [{logical: a, stored: 'b.{r}', over: r, average: true}]",
            "no field {r#}",
        ),
        (
            "name: x\nrules: [{logical: a, stored: 'b.{r#}', over: r, sharded: 0, average: true}]",
            "sharded and average exclude each other",
        ),
        (
            "name: x\nrules: [{logical: [a], stored: b, fused: {dim: 0, sizes: [1, 2]}}]",
            "fused.sizes has 2 entries for 1 logical tensors",
        ),
        (
            "name: x\nrules: [{logical: a, stored: b, padded: {dim: -1}}]",
            "rules.0.padded.dim: got -1, expected greater than or equal to 0",
        ),
        ("name: x\nrules: [{logical: a, stored: b, padded: {dim: true}}]", "padded.dim"),
    ],
)
def test_bad_specs(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(text, "my.yaml")
    assert str(caught.value).startswith("my.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_specs_that_cannot_be_found_or_read(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="neither a file nor a packaged one"):
        load_spec(tmp_path / "none.yaml")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="cannot be read as UTF-8"):
        load_spec(tmp_path / "bytes")
    (tmp_path / "large").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(SpecError, match="is larger than"):
        load_spec(tmp_path / "large")


def test_errors_survive_pickling() -> None:
    error = ConversionError("x", ["a", "b", "c", "d", "e", "f", "g"])
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert "a; b; c; d; e; and 2 more" in str(again)
