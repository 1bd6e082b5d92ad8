"""The command line: what it prints, its help, its version, and how light it is."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import everstep
from everstep.trainer.config_load import load_config, parse_config
from tests.support.cli import exit_code as run

ROOT = Path(everstep.__file__).parent.parent


def fresh(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a new interpreter that finds this everstep."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_config_show_prints_a_config_that_loads(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("config", "show", "demo", "optim.lr=1e-2", "--nproc", "4") == 0
    text = capsys.readouterr().out
    assert parse_config(text, "shown") == load_config("demo", ["optim.lr=1e-2"])
    header = [line for line in text.splitlines() if line.startswith("# ")]
    assert header[0] == "# everstep config, resolved from demo and 1 override"
    assert header[1] == "# ranks:      4 (mesh dp_shard 2 x tp 2)"
    assert "2 data-parallel ranks x 1 micro-batch of 8" in header[2]
    assert header[4] == "# parameters: 3.38M"


def test_config_show_resolves_for_a_number_of_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("config", "show", "llama_8b", "--nproc", "16") == 0
    header = capsys.readouterr().out.splitlines()[:5]
    assert header[1] == "# ranks:      16 (mesh dp_shard 16)"
    assert "16 data-parallel ranks x 32 micro-batches of 1" in header[2]
    assert header[4] == "# parameters: 8.03B"


def test_config_show_with_a_model_and_a_tokenizer_of_ones_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("config", "show", "debug_single", "model.factory=a.b:c") == 0
    assert "# parameters: known once a.b:c has built the model" in capsys.readouterr().out
    given = ("data.tokenizer=some.json", "model.vocab_size=1000")
    assert run("config", "show", "debug_single", *given) == 0
    assert "# parameters: 227k" in capsys.readouterr().out
    assert run("config", "show", "debug_single", "data.tokenizer=some.json") == 1
    assert "error: data.tokenizer: there is no file 'some.json'" in capsys.readouterr().err


def test_config_list_names_every_config_with_its_description(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("config", "list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 14
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("demo ") and "on 4 ranks" in line for line in lines)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"everstep {everstep.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["Start here:", "everstep train demo", "doctor"]),
        (
            ["train"],
            ["--launcher", "--address", "--nproc N", "--resume auto|never|STEP", "torchrun"],
        ),
        (["config"], ["list", "show"]),
        (["config", "show"], ["CONFIG", "KEY=VALUE", "--nproc"]),
        (["doctor"], ["everstep doctor my.yaml"]),
    ],
)
def test_help(
    capsys: pytest.CaptureFixture[str], arguments: Sequence[str], words: Sequence[str]
) -> None:
    assert run(*arguments, "--help") == 0
    text = capsys.readouterr().out
    assert all(word in text for word in words)
    assert all(len(line) <= 100 for line in text.splitlines())


@pytest.mark.parametrize(
    ("arguments", "banned"),
    [
        (["--help"], {"torch", "numpy", "pydantic", "ray", "yaml", "rich", "importlib.metadata"}),
        (["train", "--help"], {"torch", "numpy", "ray", "yaml", "rich"}),
        (["--version"], {"torch", "numpy", "pydantic", "ray", "yaml", "rich"}),
        (["config", "list"], {"torch", "numpy", "ray"}),
        (["config", "show", "demo"], {"torch", "numpy", "ray"}),
        (["train", "demo", "train.steps=0"], {"torch", "numpy", "ray"}),
        (["doctor"], {"torch", "numpy", "ray", "yaml"}),
    ],
)
def test_nothing_heavy_is_imported(arguments: Sequence[str], banned: set[str]) -> None:
    # Some versions of typer import pydantic for commands that have arguments.
    code = (
        "import sys\n"
        "from everstep.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    print('\\n' + ' '.join(sys.modules))\n"
    )
    loaded = set(fresh(code, *arguments).stdout.splitlines()[-1].split())
    assert "everstep.cli" in loaded
    assert not loaded & banned


def test_the_face_imports_nothing_and_gives_everything() -> None:
    code = (
        "import sys, everstep\n"
        "assert not {'torch', 'numpy', 'pydantic', 'yaml'} & set(sys.modules)\n"
        "assert set(everstep.__all__) <= set(dir(everstep))\n"
        "print(*(getattr(everstep, name).__module__ for name in everstep.__all__ "
        "if name != '__version__'))\n"
    )
    done = fresh(code)
    assert done.stderr == ""
    assert all(module.startswith("everstep.") for module in done.stdout.split())
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        everstep.nothing  # noqa: B018


def test_running_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "everstep", "train", "demo", "lr=1"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "error: command line: unknown key lr; did you mean optim.lr?\n"
