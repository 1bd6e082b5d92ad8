"""Ranks meet through the store of the local driver; the launcher itself never imports torch."""

import json
import sys
from datetime import timedelta
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from everstep.cluster.run import run_local
from everstep.trainer.config import RunConfig, TrainConfig
from everstep.trainer.rank_spec import RankSpec, Reporter, StopRequested


def meet(spec: RankSpec, report: Reporter, should_stop: StopRequested) -> int:
    """Every rank puts its number into the store and reads those of all others."""
    import torch.distributed as dist

    assert spec.store is not None
    host, _, port = spec.store.rpartition(":")
    assert host == "127.0.0.1"
    limit = timedelta(seconds=60)
    store = dist.TCPStore(host, int(port), is_master=False, timeout=limit)
    store.set(f"rank{spec.rank}", str(spec.rank))
    names = [f"rank{rank}" for rank in range(spec.world_size)]
    report({"kind": "met", "ranks": [int(store.get(name)) for name in names]})
    return 0


@pytest.mark.multiproc
def test_ranks_meet(tmp_path: Path) -> None:
    torch_before = "torch" in sys.modules
    errors = StringIO()
    code = run_local(
        RunConfig(name="meet", train=TrainConfig(steps=1)),
        tmp_path / "run",
        "auto",
        3,
        Console(file=StringIO()),
        error_console=Console(file=errors),
        target=f"{__name__}:meet",
        preload=["torch.distributed"],
    )
    assert code == 0, errors.getvalue()
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    met = [json.loads(line) for line in lines if '"met"' in line]
    assert [report["ranks"] for report in met] == [[0, 1, 2]] * 3
    assert ("torch" in sys.modules) == torch_before
