"""What the config models accept, in words, and which key was probably meant."""

import pytest
from pydantic import Field

from everstep.trainer.config import RunConfig, Section
from everstep.trainer.config_schema import ELSEWHERE, describe, field_at, keys, nearest_key


class Lists(Section):
    """A section with a list that may be absent, as none of ours has it."""

    names: list[str | None] = Field(default_factory=list)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("train.steps", "an integer >= 1"),
        ("launch.port", "an integer >= 0 and <= 65535"),
        ("train.grace_s", "a number > 0"),
        ("mesh.dp_shard", "an integer >= 1 or 'auto'"),
        ("optim.schedule", "one of 'cosine', 'wsd', 'constant'"),
        ("model.tie_embeddings", "true or false"),
        ("model.factory", "a string or nothing (null)"),
        ("metrics", "a section with the keys sinks"),
        ("checkpoint.memory", "one of 'keeper', 'process' or nothing (null)"),
        ("checkpoint.memory_budget_bytes", "an integer >= 1048576 or nothing (null)"),
    ],
)
def test_descriptions(key: str, words: str) -> None:
    field = field_at(key.split("."))
    assert field is not None
    assert describe(field) == words


def test_descriptions_of_lists() -> None:
    assert describe(Lists.model_fields["names"]) == "a list of strings or nothing (null)"


def test_every_field_can_be_described() -> None:
    for path in keys():
        field = field_at(path)
        assert field is not None
        assert describe(field)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.stps", "train.steps"),
        ("modle.dim", "model.dim"),
        ("mesh.tensor_parallel", "mesh.tp"),
        ("train.batch_size", "data.global_batch"),
        ("every_step", "checkpoint.every_steps"),
        ("sinks", "metrics.sinks"),
        ("train.nothing_like_it", None),
    ],
)
def test_the_nearest_key(key: str, meant: str | None) -> None:
    assert nearest_key(key.split(".")) == meant


def test_names_from_elsewhere_lead_to_keys_that_exist_and_are_none_themselves() -> None:
    valid = {".".join(path) for path in keys()}
    assert set(ELSEWHERE.values()) <= valid
    assert not {path[-1] for path in keys()} & set(ELSEWHERE)


def test_unknown_paths_have_no_field() -> None:
    assert field_at(["model", "nothing"]) is None
    assert field_at(["optim", "lr", "x"]) is None
    assert field_at([]) is None
    assert len(list(keys())) > len(RunConfig.model_fields)
