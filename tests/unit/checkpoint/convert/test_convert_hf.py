"""Hugging Face folders: transformers computes the same logits, and its folders come back."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.convert.architecture import from_hf_config, to_hf_config
from everstep.checkpoint.convert.errors import ArchitectureError, ConversionError, TargetExistsError
from everstep.checkpoint.convert.hf import export_hf, import_hf
from everstep.checkpoint.errors import CheckpointError
from everstep.checkpoint.open_place import open_place
from everstep.checkpoint.torch_state import State
from everstep.trainer.architecture import ArchitectureNote, architecture_of
from everstep.trainer.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from everstep.trainer.init import materialise
from everstep.trainer.model import Llama, build_model

MIB = 2**20
VOCAB = 100


def config_of(**model: Any) -> RunConfig:
    shape = {"dim": 64, "layers": 3, "heads": 4, "kv_heads": 2}
    return RunConfig(
        train=TrainConfig(steps=1),
        model=ModelConfig(**shape | {"rope_theta": 5000.0, "norm_eps": 3e-5} | model),
        data=DataConfig(seq_len=32),
    )


def model_of(config: RunConfig) -> Llama:
    model = build_model(config.model, vocab_size=VOCAB, seq_len=32, seed=0)
    assert isinstance(model, Llama)
    materialise(model, torch.device("cpu"), 0)
    return model.eval()


def saved(root: Path, config: RunConfig, model: Llama) -> Path:
    state = State(model=model, architecture=ArchitectureNote(config, VOCAB))
    with Checkpointer(root) as checkpointer:
        return Path(checkpointer.save(3, state).durable.result().path)


THEIR_PROGRAM = """
import sys
sys.modules["everstep"] = None  # cannot be imported
import numpy, torch, transformers
tokens_BL = torch.arange(64).reshape(2, 32)
for folder in sys.argv[1:]:
    model, loading = transformers.LlamaForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(loading.values()), loading
    assert model.dtype == torch.float32
    with torch.no_grad():
        numpy.save(folder + ".npy", model(tokens_BL).logits.numpy())
    model.bfloat16().save_pretrained(folder + ".theirs")
"""


@pytest.mark.timeout(240)
def test_transformers_computes_the_same_logits(tmp_path: Path) -> None:
    models = {}
    for tie in (False, True):
        config = config_of(tie_embeddings=tie)
        folder = tmp_path / f"tied-{tie}"
        models[folder] = model_of(config)
        with open_place(saved(tmp_path / f"c-{tie}", config, models[folder])).open() as reader:
            export_hf(reader, folder, max_shard_bytes=200_000, budget_bytes=MIB)
        assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    command = [sys.executable, "-c", THEIR_PROGRAM, *map(str, models)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for folder, model in models.items():
        theirs = torch.from_numpy(np.load(f"{folder}.npy"))
        with torch.no_grad():
            ours = model(torch.arange(64).reshape(2, 32))
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)

        step = import_hf(Path(f"{folder}.theirs"), Path(f"{folder}.back"), budget_bytes=MIB)
        with open_place(step).open() as reader:
            export_hf(reader, Path(f"{folder}.again"))
        again = load_file(Path(f"{folder}.again") / "model.safetensors")
        for name, parameter in model.named_parameters():
            assert torch.equal(again[name], parameter.bfloat16().float())


def test_one_shard_has_no_index_and_a_dtype_can_be_chosen(tmp_path: Path) -> None:
    config = config_of()
    model = model_of(config)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with open_place(saved(tmp_path / "c", config, model)).open() as reader:
        export_hf(reader, tmp_path / "hf", dtype="BF16", tokenizer=tmp_path / "tokenizer.json")
        with pytest.raises(TargetExistsError):
            export_hf(reader, tmp_path / "hf")
        with pytest.raises(CheckpointError, match="there is no tokenizer file"):
            export_hf(reader, tmp_path / "other", tokenizer=tmp_path / "none.json")
    assert not (tmp_path / "other").exists()
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    found = load_file(tmp_path / "hf" / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter.bfloat16())
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_architecture_survives_and_is_compared() -> None:
    found = architecture_of(config_of(), VOCAB)
    assert from_hf_config(to_hf_config(found, "F32"), "x") == found
    other = architecture_of(config_of(dim=32, norm_eps=1e-6), VOCAB)
    assert found.differences(other) == [
        "model.dim is 64 here and 32 there",
        "model.head_dim is 16 here and 8 there",
        "model.ffn_dim is 192 here and 128 there",
        "model.norm_eps is 3e-05 here and 1e-06 there",
    ]
    # as older and newer versions of transformers write it, with what they leave out
    config = {
        "model_type": "llama",
        "vocab_size": 10,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    plain = from_hf_config(config, "x")
    assert (plain.kv_heads, plain.head_dim, plain.norm_eps, plain.rope_theta) == (2, 4, 1e-6, 1e4)
    newer = config | {"rope_parameters": {"rope_theta": 500, "rope_type": "default"}}
    assert from_hf_config(newer, "x").rope_theta == 500.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "positions are scaled ('llama3')"),
        ({"rope_scaling": {"type": "linear"}}, "positions are scaled ('linear')"),
        ({"rope_scaling": "linear"}, "rotary positions are 'linear', expected a mapping"),
        ({"hidden_size": None}, "hidden_size (our dim) is None"),
        ({"hidden_size": "64", "head_dim": None}, "hidden_size (our dim) is '64'"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers (our layers) is '3'"),
        ({"rms_norm_eps": float("nan")}, "expected a positive float"),
        ({"tie_word_embeddings": 1}, "expected true or false"),
    ],
)
def test_configurations_that_are_not_ours(change: dict[str, Any], message: str) -> None:
    config = to_hf_config(architecture_of(config_of(), VOCAB), "F32") | change
    with pytest.raises(CheckpointError) as caught:
        from_hf_config(config, "dir/config.json")
    assert message in str(caught.value)
    assert str(caught.value).startswith("dir/config.json")


def test_imports_that_cannot_be(tmp_path: Path) -> None:
    config = config_of()
    with open_place(saved(tmp_path / "c", config, model_of(config))).open() as reader:
        export_hf(reader, tmp_path / "hf")
    source = tmp_path / "hf"

    def refused(error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            import_hf(source, tmp_path / "new")
        assert not (tmp_path / "new").exists()

    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"lm_head.bias": torch.zeros(3)}, source / "model.safetensors")
    refused(ConversionError, "no rule uses its tensor 'lm_head.bias'")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, source / "model.safetensors")
    refused(ConversionError, r"it lacks 'model.model.layers.1.mlp.up_proj.weight'")
    told = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(told | {"mlp_bias": True}))
    refused(ArchitectureError, "mlp_bias is True")
    (source / "config.json").write_text("[" * 10_000)
    refused(CheckpointError, "is not JSON")
    (source / "config.json").unlink()
    refused(CheckpointError, "put the config.json that belongs to the tensors")
    shutil.rmtree(source)
    refused(CheckpointError, "there is no ")


def test_a_tied_head_that_is_stored_anyway(tmp_path: Path) -> None:
    config = config_of(tie_embeddings=True)
    with open_place(saved(tmp_path / "c", config, model_of(config))).open() as reader:
        export_hf(reader, tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    with open_place(import_hf(tmp_path / "hf", tmp_path / "new")).open() as reader:
        assert "model.lm_head.weight" not in reader.manifest.tensors


def test_checkpoints_that_do_not_say_what_they_are_of(tmp_path: Path) -> None:
    config = config_of()
    with Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.save(0, State(model=model_of(config)))
    with (
        open_place(tmp_path / "c").open() as reader,
        pytest.raises(CheckpointError, match="is missing"),
    ):
        export_hf(reader, tmp_path / "hf")
    own = config_of(factory="pkg:make")
    state = State(model=model_of(config), architecture=ArchitectureNote(own, VOCAB))
    with Checkpointer(tmp_path / "d") as checkpointer:
        checkpointer.save(0, state)
    with (
        open_place(tmp_path / "d").open() as reader,
        pytest.raises(CheckpointError, match=r"a model of its own \(model.factory\)"),
    ):
        export_hf(reader, tmp_path / "hf")
