"""A run whose checkpoints live in an object store, through the command line."""

from pathlib import Path

import pytest

from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.store_fsspec import FsspecStore
from tests.e2e.conftest import WORDS
from tests.support import cli
from tests.support.s3_server import S3Server

RUN = """
name: remote
train: {{steps: 4}}
model: {{dim: 32, layers: 1, heads: 2, kv_heads: 2, ffn_dim: 64}}
data: {{source: text.txt, tokenizer: bytes, seq_len: 32, global_batch: 4}}
mesh: {{dp_shard: 2}}
checkpoint: {{every_steps: 2, keep: 1, directory: "{url}"}}
"""


@pytest.mark.slow
def test_a_run_saves_to_s3_and_goes_on_from_there(tmp_path: Path, s3: S3Server) -> None:
    url = s3.new_url()
    (tmp_path / "text.txt").write_text(" ".join(WORDS * 400))
    (tmp_path / "run.yaml").write_text(RUN.format(url=url))
    variables = {
        "AWS_ENDPOINT_URL": s3.endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "eu-west-1",
    }
    code, output = cli.run("train", "run.yaml", cwd=tmp_path, variables=variables)
    assert code == 0, output
    assert f"{url}/step-00000004-g00001" in output
    code, output = cli.run("train", "run.yaml", "train.steps=6", cwd=tmp_path, variables=variables)
    assert code == 0, output
    assert f"resumed from step 4 ({url}/step-00000004-g00001)" in output
    assert not (tmp_path / "runs" / "remote" / "checkpoints").exists()
    directory = CheckpointDirectory(FsspecStore(url, s3.options))
    assert directory.committed() == [StepId(2, 6)]
