"""Loading configs: what is accepted, and one readable sentence for everything that is not."""

import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.trainer.config import RunConfig, TrainConfig
from everstep.trainer.config_load import (
    dump_config,
    find_config,
    load_config,
    packaged_configs,
    parse_config,
)
from everstep.trainer.errors import ConfigError

MINIMAL = "train: {steps: 10}"


def complaint(text: str, *overrides: str) -> str:
    """The message of the ConfigError that the text must cause."""
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "my.yaml", overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_numbers_as_people_write_them() -> None:
    text = "train: {steps: 1e3, grace_s: 5}\noptim: {lr: 3e-4, eps: 1E-9}\nseed: 1_000"
    config = parse_config(text, "my.yaml")
    assert config.train.steps == 1000
    assert isinstance(config.train.steps, int)
    assert config.optim.lr == 3e-4
    assert config.optim.eps == 1e-9
    assert config.seed == 1000


def test_an_empty_section_means_defaults() -> None:
    assert parse_config(f"{MINIMAL}\nmodel:\n", "my.yaml") == parse_config(MINIMAL, "my.yaml")


def test_overrides_win_and_the_last_of_them_most() -> None:
    config = parse_config(
        "train: {steps: 10}\nmodel: {factory: 'a:b', factory_args: {width: 3}}",
        "my.yaml",
        ["train.steps=20", "train.steps=30", "model.factory_args.depth=[1, 2]", "optim.lr=1e-2"],
    )
    assert config.train.steps == 30
    assert config.model.factory_args == {"width": 3, "depth": [1, 2]}
    assert config.optim.lr == 0.01


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("*.txt", "*.txt"),
        ("[a.txt, 'b c.txt']", ["a.txt", "b c.txt"]),
        ("'3'", "3"),
        ("&x!y", "&x!y"),
        ("a: b", "a: b"),
        ("<<", "<<"),
        (" padded ", "padded"),
    ],
)
def test_override_values(text: str, value: object) -> None:
    assert parse_config(MINIMAL, "my.yaml", [f"data.source={text}"]).data.source == value


def test_an_override_can_clear_an_optional_value() -> None:
    text = f"{MINIMAL}\nmodel: {{factory: 'a:b'}}"
    assert parse_config(text, "my.yaml", ["model.factory="]).model.factory is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  stps: 5", "my.yaml, line 2: unknown key train.stps; did you mean train.steps?"),
        (
            f"{MINIMAL}\ndata:\n  global_batc: 8",
            "my.yaml, line 3: unknown key data.global_batc; did you mean data.global_batch?",
        ),
        (
            f"{MINIMAL}\ntokenizer: bytes",
            "my.yaml, line 2: unknown key tokenizer; did you mean data.tokenizer?",
        ),
        (f"{MINIMAL}\nmodle: {{}}", "my.yaml, line 2: unknown key modle; did you mean model?"),
        (
            f"{MINIMAL}\noptim: {{learning_rate: 1}}",
            "my.yaml, line 2: unknown key optim.learning_rate; did you mean optim.lr?",
        ),
        (
            f"{MINIMAL}\nlaunch: {{qqqq: 1}}",
            "my.yaml, line 2: unknown key launch.qqqq; the keys there are port",
        ),
        ("1: 2", "my.yaml, line 1: unknown key 1; the keys there are name, seed, train, model, "),
        (
            "train: 5",
            "my.yaml, line 1: train: got 5, expected a section with the keys steps, eval_every, ",
        ),
        ("model: {}", "my.yaml: train.steps is missing, expected an integer >= 1"),
        ("train: {}", "my.yaml, line 1: train.steps is missing, expected an integer >= 1"),
        (
            f"{MINIMAL}\nmesh:\n  dp_shard: autoo",
            "my.yaml, line 3: mesh.dp_shard: got 'autoo', expected an integer >= 1 or 'auto'",
        ),
        (
            f"{MINIMAL}\nmesh: {{dp_shard: 0}}",
            "my.yaml, line 2: mesh.dp_shard: got 0, expected an integer >= 1 or 'auto'",
        ),
        ("train: {steps: true}", "train.steps: got true, expected an integer >= 1"),
        ("train: {steps: 1.5}", "train.steps: got 1.5, expected an integer >= 1"),
        ("train: {steps: null}", "train.steps: got null, expected an integer >= 1"),
        (f"{MINIMAL}\noptim: {{lr: .inf}}", "optim.lr: got inf, expected a number > 0"),
        (
            f"{MINIMAL}\noptim: {{betas: [0.9, 1.0]}}",
            "optim.betas: got [0.9, 1.0], expected a list of 2 numbers >= 0 and < 1",
        ),
        (
            f"{MINIMAL}\noptim: {{betas: [0.9]}}",
            "optim.betas: got [0.9], expected a list of 2 numbers >= 0 and < 1",
        ),
        (
            f"{MINIMAL}\noptim: {{lr: {{peak: 1}}}}",
            "optim.lr: got {'peak': 1}, expected a number > 0",
        ),
        (
            f"{MINIMAL}\nparallel: {{timeout_s: 1.0e15}}",
            "parallel.timeout_s: got 1000000000000000.0, expected a number > 0 and <= 1000000",
        ),
        (
            f"{MINIMAL}\nparallel: {{precision: fp16}}",
            "parallel.precision: got 'fp16', expected one of 'fp32', 'bf16'",
        ),
        (
            f"{MINIMAL}\nparallel: {{compile: 3}}",
            "parallel.compile: got 3, expected true or false",
        ),
        (
            f"{MINIMAL}\nmetrics: {{sinks: jsonl}}",
            "metrics.sinks: got 'jsonl', expected a list of strings; write [jsonl]",
        ),
        (
            f"{MINIMAL}\ndata: {{source: {{a: 1}}}}",
            "data.source: got {'a': 1}, expected a string or a list of strings",
        ),
        (
            f"{MINIMAL}\ndata: {{source: [{{path: a, wieght: 2}}]}}",
            "my.yaml, line 2: unknown key data.source[0].wieght; did you mean weight?",
        ),
        (
            f"{MINIMAL}\ndata: {{source: [{{path: a}}, {{weight: 2}}]}}",
            "line 2: data.source[1].path is missing, expected files, folders, globs or URLs",
        ),
        (
            f"{MINIMAL}\ndata: {{source: [{{path: a, weight: 0}}]}}",
            "data.source[0].weight: got 0: input should be greater than 0",
        ),
        (
            f"{MINIMAL}\ndata: {{source: [a, {{path: b}}]}}",
            "data.source[0]: got 'a' beside entries with keys; write {path: a}, or only paths",
        ),
        (
            f"{MINIMAL}\nname: 125",
            "name: got 125, expected a string that matches ^[A-Za-z0-9][A-Za-z0-9._-]*$; put it in "
            "quotes to make it a string",
        ),
        (f"{MINIMAL}\nseed: {2**63}", "expected an integer >= 0 and < 2^63"),
        (
            f"{MINIMAL}\nmodel:\n  dim: 100\n  heads: 3",
            "my.yaml, line 2: model.dim=100 is not a multiple of model.heads=3",
        ),
        (
            f"{MINIMAL}\nlaunch:\n  resources_per_rank: {{slots: -1}}",
            "my.yaml, line 2: launch.resources_per_rank.slots: got -1, expected a number >= 0",
        ),
        (
            f"{MINIMAL}\nlaunch: {{resources_per_rank: {{GPU: 2}}}}",
            "launch.resources_per_rank names GPU, which is reserved without it",
        ),
        (
            f"{MINIMAL}\ncheckpoint: {{every_s: 30, memory: null}}\n",
            "checkpoint.every_s=30 needs snapshots, and checkpoint.memory is null",
        ),
        (
            f"{MINIMAL}\nlaunch: {{drill_kill_step: 3, max_restarts: 0}}\n",
            "launch.drill_kill_step=3 kills all ranks, and launch.max_restarts=0 would not start",
        ),
        (f"{MINIMAL}\nmodel: {{factory_args: 3}}", "model.factory_args: got 3, expected a mapping"),
        (f"{MINIMAL}\ndata: {{source: {'x' * 99}, seq_len: 1}}", "data.seq_len: got 1"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(text: str, message: str) -> None:
    assert message in complaint(text)


def test_a_long_value_is_cut() -> None:
    message = complaint(f"train: {{steps: {'x' * 500}}}")
    assert len(message) < 150
    assert "...," in message


def test_several_wrong_keys_are_named_unknown_ones_first() -> None:
    message = complaint("train: {steps: 0}\ndata: {seq_len: 1, tokeniser: bytes}")
    assert message == (
        "my.yaml, line 2: unknown key data.tokeniser; did you mean data.tokenizer? "
        "(also wrong: train.steps, data.seq_len)"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "command line: 'steps' is not an override, expected key=value such as "),
        ("=3", "command line: '=3' is not an override"),
        ("lr=3", "command line: unknown key lr; did you mean optim.lr?"),
        ("optim.lr.x=3", "unknown key optim.lr.x: optim.lr is a value, not a section"),
        ("model=3", "command line: model: got 3, expected a section with the keys factory, "),
        ("model.dim=3", "command line: model.dim=3 is not a multiple of model.heads=8"),
        ("optim.lr=fast", "command line: optim.lr: got 'fast', expected a number > 0"),
        ("data.source=[a", "command line: data.source: '[a' is not valid YAML: expected ',' or "),
    ],
)
def test_wrong_overrides(override: str, message: str) -> None:
    assert message in complaint(MINIMAL, override)


def test_an_override_below_a_broken_section_does_not_hide_it() -> None:
    message = complaint("train: {steps: 1}\nmodel: 5", "model.dim=64")
    assert message.startswith("my.yaml, line 2: model: got 5, expected a section")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {steps: 1}\na: [", "my.yaml, line 2: not valid YAML: "),
        ("train:\n\tsteps: 1", "my.yaml, line 2: not valid YAML: found character '\\t'"),
        ("a: 1\n---\nb: 2", "my.yaml, line 2: not valid YAML: "),
        ("train: {steps: 1}\x07", "my.yaml: not valid YAML: unacceptable character"),
        ("a: !!python/object:os.system {}", "my.yaml, line 1: not valid YAML: "),
        ("", "my.yaml: expected sections such as 'train:', found nothing"),
        ("- a", "my.yaml: expected sections such as 'train:', found a list"),
        ("hello", "my.yaml: expected sections such as 'train:', found only 'hello'"),
        (
            "train:\n  steps: 1\n  steps: 2",
            "my.yaml, line 3: train.steps is already given on line 2; remove one of them",
        ),
        (
            "data:\n  source:\n    - path: a\n      weight: 1\n      weight: 2",
            "my.yaml, line 5: data.source[0].weight is already given on line 4; remove one of them",
        ),
        ("train: &t\n  steps: 1\n  x: *t", "my.yaml, line 1: a section contains itself"),
        ("model: {factory_args: {x: &x [*x]}}", "my.yaml, line 1: a section contains itself"),
        ("seed: !!int x", "my.yaml: not valid YAML: invalid literal"),
    ],
)
def test_broken_yaml(text: str, message: str) -> None:
    assert complaint(text).startswith(message)


def test_yes_no_and_dates_are_text() -> None:
    config = parse_config(f"{MINIMAL}\nname: on\ndata: {{source: [no, 2024-01-01]}}", "my.yaml")
    assert config.name == "on"
    assert config.data.source == ["no", "2024-01-01"]


def test_merge_keys_work() -> None:
    text = "train: &base {steps: 3, grace_s: 4}\n"
    with pytest.raises(ConfigError, match="unknown key other"):
        parse_config(f"{text}other: {{<<: *base, steps: 5}}", "my.yaml")
    config = parse_config("train: {<<: {steps: 3, grace_s: 4}, steps: 5}", "my.yaml")
    assert config.train == TrainConfig(steps=5, grace_s=4)


def test_load_reads_files_and_packaged_configs(tmp_path: Path) -> None:
    path = tmp_path / "demo"
    path.write_text(f"{MINIMAL}\nname: mine", encoding="utf-8")
    assert load_config(str(path)).name == "mine"
    assert load_config("demo").name == "demo"
    assert load_config("demo.yaml", ["train.steps=3"]).train.steps == 3
    assert "demo" in packaged_configs()


def test_a_missing_config_names_near_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no config 'dmeo': .*did you mean demo\?"):
        find_config("dmeo")
    with pytest.raises(ConfigError, match=r"packaged are debug_accum, .*, llama_8b$"):
        find_config("some/where/zzzzzz.yaml")
    with pytest.raises(ConfigError, match="is a folder, expected a YAML file"):
        find_config(str(tmp_path))


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml cannot be read as UTF-8 text"):
        load_config(str(path))


def test_errors_in_files_say_which_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {steps: 0}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run\.yaml, line 1: train\.steps: got 0") as caught:
        load_config(str(path))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12),
    st.sampled_from(
        [
            "1e-4",
            "3e5",
            "yes",
            "off",
            "null",
            "~",
            "",
            "2024-01-01",
            "1:30",
            "010",
            "0x1F",
            "1_000",
            ".5",
            "+3",
            "- a",
            "a: b",
            "# c",
            "*x",
            "<<",
            "=",
            "'",
            "1.",
        ]
    ),
)
arguments = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8),
    st.recursive(scalars, lambda inner: st.lists(inner, max_size=3), max_leaves=5),
    max_size=4,
)


@settings(deadline=None)
@given(
    arguments=arguments,
    lr=st.floats(min_value=1e-30, max_value=1e30),
    source=st.one_of(
        st.just("1e-4"),
        st.lists(st.text(st.characters(codec="ascii", exclude_categories=["Cc"])), max_size=3),
    ),
)
def test_what_is_dumped_reads_back_equal(
    arguments: dict[str, object], lr: float, source: str | list[str]
) -> None:
    config = RunConfig.model_validate(
        {
            "name": "1e-4",
            "train": {"steps": 3},
            "model": {"factory": "a:b", "factory_args": arguments},
            "optim": {"lr": lr},
            "data": {"source": source},
        }
    )
    assert parse_config(dump_config(config), "dump") == config


def test_every_field_is_dumped_and_described() -> None:
    config = RunConfig(train=TrainConfig(steps=1))
    text = dump_config(config)
    for section, field in RunConfig.model_fields.items():
        assert f"{section}:" in text
        for name, below in getattr(field.annotation, "model_fields", {}).items():
            assert f"  {name}:" in text
            assert below.description, f"{section}.{name} has no description"
