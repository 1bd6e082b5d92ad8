"""The programs of docs/views.md read every tensor, where this package cannot be imported."""

import contextlib
import json
from pathlib import Path

import fsspec
import pytest

from tests.support.foreign import run_foreign
from tests.support.s3_server import S3Server
from tests.support.view_programs import definitions, programs
from tests.support.written_steps import Cut, random_bits, torch_chunks, uneven_cuts, write_step

STEP = "step-00000100-g00001"


@pytest.fixture(scope="module")
def cuts() -> dict[str, Cut]:
    head = Cut("BF16", random_bits((1001, 6), "BF16", 50), (torch_chunks(1001, 2, 4), ()))
    embed = Cut("F32", random_bits((9, 4), "F32", 51), (torch_chunks(9, 4), ()))
    return {**uneven_cuts(), "model.head.weight": head, "model.embed.weight": embed}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cuts: dict[str, Cut]) -> Path:
    """A working directory as the page has it, and ``wanted.json``: the bytes of each tensor."""
    folder = tmp_path_factory.mktemp("views")
    write_step(folder / "checkpoints", cuts, step=100)
    wanted = {n: [c.dtype, c.bits.shape, c.bits.tobytes().hex()] for n, c in cuts.items()}
    (folder / "wanted.json").write_text(json.dumps(wanted))
    with contextlib.chdir(folder):
        exec(programs("zarr-python", "python everstep"), {})
    return folder


CHECK = """
import json, sys, urllib.parse
for name, (dtype, shape, data) in json.load(open("wanted.json")).items():
    node = name.replace("%", "%25").replace("/", "%2F")
    node = "%5F" + node[1:] if node.startswith("__") else node
    found = read(name, node)
    assert tuple(found.shape) == tuple(shape), name
    assert found.tobytes().hex() == data, name
"""


def test_tensorstore(folder: Path, cuts: dict[str, Cut]) -> None:
    step = (folder / "checkpoints" / STEP).as_uri() + "/"
    program = programs("TensorStore").replace(f"file:///data/run7/checkpoints/{STEP}/", step)
    check = """
names = set()
def read(name, node):
    tensor = open_tensor(step, node)
    names.add(tensor.dtype.name)
    return tensor.read().result()
"""
    report = "\nprint(sorted(names))\nassert rows.shape == (4, 4)"
    names = run_foreign(program + check + CHECK + report, folder)
    assert all(name in names for name in ("'bfloat16'", "'float8_e4m3fn'", "'float8_e5m2'"))


def test_zarr(folder: Path) -> None:
    check = """
assert weight.dtype == ml_dtypes.bfloat16 and dict(group.attrs)["everstep_step"] == 100
read = lambda name, node: read_tensor(group, node)
"""
    run_foreign(programs("zarr-python") + check + CHECK, folder)


def test_a_copy_that_was_moved(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    (folder / "checkpoints" / STEP).rename(moved)
    override = f'"fo": "references.json", "template_overrides": {{"u": "{moved}"}}'
    program = programs("zarr-python").replace('"fo": "references.json"', override)
    try:
        run_foreign(program, folder)
    finally:
        moved.rename(folder / "checkpoints" / STEP)


def test_safetensors(folder: Path) -> None:
    check = """
def read(name, node):
    tensor = read_fragments(Path("checkpoints/STEP"), name)
    data = tensor.reshape(-1).view(torch.uint8).numpy()
    return data.view(f"V{tensor.element_size()}").reshape(tensor.shape)
""".replace("STEP", STEP)
    run_foreign(programs("safetensors") + check + CHECK, folder)


@pytest.mark.slow
def test_an_object_store(folder: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.options["secret"])
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = s3.new_url().removeprefix("s3://").partition("/")[0]
    store = fsspec.filesystem("s3", endpoint_url=s3.endpoint)
    store.put(str(folder / "checkpoints"), f"{bucket}/run7/checkpoints", recursive=True)
    store.put(str(folder / "references.json"), f"{bucket}/run7/references.json")
    base = {
        "driver": "s3",
        "bucket": bucket,
        "endpoint": s3.endpoint,
        "aws_region": "us-east-1",
        "path": f"run7/checkpoints/{STEP}/",
    }
    read = f"read = lambda name, node: open_tensor({base!r}, node).read().result()"
    run_foreign(definitions("TensorStore") + read + CHECK, folder)
    opened = programs("zarr-python", "python s3")
    opened = opened.replace("https://s3.example.org", s3.endpoint)
    opened = opened.replace("s3://bucket/", f"s3://{bucket}/")
    read = "read = lambda name, node: read_tensor(group, node)"
    run_foreign(definitions("zarr-python") + opened + read + CHECK, folder)
