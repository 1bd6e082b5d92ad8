"""The spec of docs/converting.md does what the page says, in both directions."""

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from everstep.checkpoint.convert.spec import packaged_specs
from everstep.checkpoint.open_place import open_place
from tests.support.ckpt_runs import Ckpt, ckpt

__all__ = ["ckpt"]
PAGE = (Path(__file__).parents[2] / "docs" / "converting.md").read_text(encoding="utf-8")


def _snippet(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    return str(found)


def test_the_spec(tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)

    def array(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    norm, embed = array(6), np.concatenate([array(100, 4), np.zeros((28, 4), np.float32)])
    stored = {
        "h.0.up.w": array(3, 4),
        "h.0.w2": array(5, 7),
        "h.0.qkv": array(128, 4),
        "embed": embed,
        "head.0": array(4, 3),
        "head.1": array(4, 3),
        **{f"norm.{rank}": norm for rank in range(3)},
        "flat.0": array(7),
        "flat.1": array(7),
    }
    Path("shards").mkdir()
    save_file({**stored, "h.0.inv_freq": array(2)}, "shards/all.safetensors")
    Path("mine.yaml").write_text(_snippet("yaml"), encoding="utf-8")
    (command,) = [line for line in PAGE.splitlines() if "--spec mine.yaml" in line]
    ckpt(*command.split()[2:])

    flat = np.concatenate([stored["flat.0"], stored["flat.1"]])
    qkv = stored["h.0.qkv"]
    wanted = {
        "model.layers.0.mlp.up.weight": stored["h.0.up.w"],
        "model.layers.0.down.weight": stored["h.0.w2"].T,
        "model.layers.0.q": qkv[:64],
        "model.layers.0.k": qkv[64:96],
        "model.layers.0.v": qkv[96:],
        "model.embed.weight": embed[:100],
        "model.head.weight": np.concatenate([stored["head.0"], stored["head.1"]], axis=1),
        "model.norm.weight": norm,
        "model.a": flat[:9].reshape(3, 3),
        "model.b": flat[9:],
    }
    with open_place("checkpoints/mine").open() as reader:
        assert reader.manifest.tensors.keys() == wanted.keys()
        for name, values in wanted.items():
            spec = reader.manifest.tensors[name].spec
            assert spec.shape == values.shape, name
            assert reader.read(name, spec.whole).tobytes() == values.tobytes(), name

    exec(_snippet("python"), {})
    back = load_file("back.safetensors")
    assert back.keys() == stored.keys()
    for name, values in stored.items():
        np.testing.assert_array_equal(back[name], values, err_msg=name)


def test_the_packaged_specs_are_named() -> None:
    assert all(f"`{name}`" in PAGE for name in packaged_specs())
