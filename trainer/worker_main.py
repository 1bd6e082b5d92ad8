"""One rank of a run, from its spec to its exit code; the same under every launcher."""

import os
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.collective import Collective, on_rank0
from everstep.checkpoint.errors import CheckpointError
from everstep.checkpoint.keeper.client import KeeperMemory
from everstep.checkpoint.snapshots.arena import ArenaMemory
from everstep.checkpoint.snapshots.handle import StepInfo
from everstep.checkpoint.snapshots.memory import SlotMemory
from everstep.checkpoint.torch_collective import ProcessGroupCollective
from everstep.checkpoint.torch_rng import derive_rng
from everstep.trainer.checkpoint_place import checkpoint_place
from everstep.trainer.commands import RESUBMIT_VARIABLE
from everstep.trainer.config import RunConfig
from everstep.trainer.config_load import parse_config
from everstep.trainer.data import Corpus, TrainStream, check_held_out_fits, open_corpus
from everstep.trainer.data.prefetch import BatchStream, prefetched
from everstep.trainer.device import prepare_device
from everstep.trainer.engine import TorchEngine
from everstep.trainer.init_from import init_from
from everstep.trainer.loop import Run, train
from everstep.trainer.mesh_shape import (
    MeshShape,
    check_config,
    local_device,
    resolve_mesh,
    settle_micro_batch,
)
from everstep.trainer.meter import step_meter
from everstep.trainer.metrics import open_sinks
from everstep.trainer.model_shape import resolve_model
from everstep.trainer.rank_spec import (
    EXIT_DONE,
    EXIT_STOPPED,
    RankSpec,
    Reporter,
    StopRequested,
)
from everstep.trainer.sample import generate
from everstep.trainer.saves import MemoryUse, Saves, Say, transfer_teller
from everstep.trainer.snapshot_memory import snapshot_memory
from everstep.trainer.summary import summarise

SAMPLE_PROMPT = "def "
PROGRESS_EVERY_S = 3.0


def run_rank(spec: RankSpec, report: Reporter, should_stop: StopRequested) -> int:
    """Train as one rank of a job.

    Args:
        spec: what to run, as which rank.
        report: takes this rank's reports (see ``rank_spec``).
        should_stop: asked once per step.

    Returns:
        ``EXIT_DONE`` or ``EXIT_STOPPED``.

    Raises:
        EverstepError: what a person can mend; every other error is a defect or a lost peer.
    """

    def say(kind: str, **facts: Any) -> None:
        report({"kind": kind, "rank": spec.rank, **facts})

    config = parse_config(spec.config_yaml, f"{spec.run_dir}/config.yaml")
    shape = resolve_mesh(config.mesh, spec.world_size)
    check_config(config, shape)
    config = settle_micro_batch(config, shape)
    # Any model that ends in a plain layer makes FSDP2 say this; in-place operations are its own.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    device = _choose_device(config, spec)
    prepare_device(config.parallel, device)
    _join_group(config, spec, device)
    code = _run(spec, config, shape, device, say if spec.rank == 0 else _mute, should_stop)
    # Not after an error: with a peer gone this can block, and the error would never be told.
    dist.destroy_process_group()
    return code


def _run(
    spec: RankSpec,
    config: RunConfig,
    shape: MeshShape,
    device: torch.device,
    say: Say,
    should_stop: StopRequested,
) -> int:
    run_dir = Path(spec.run_dir)
    collective = ProcessGroupCollective(timeout_s=config.parallel.timeout_s)
    corpus = _open_corpus(config, run_dir, collective, say)
    coordinate = shape.coordinate(spec.rank)
    dp_rank = coordinate["dp_replicate"] * shape.dp_shard + coordinate["dp_shard"]
    document_end = corpus.tokenizer.eos_id if config.data.document_mask else None
    engine = TorchEngine(config, shape, device, corpus.vocab_size, document_end)
    place = ".".join(f"{axis}{index}" for axis, index in coordinate.items())
    derive_rng(config.seed, 0, place)
    source = TrainStream(corpus, config.data, config.seed, dp_rank, shape.dp)
    memory = _snapshot_memory(config, spec)
    with (
        Checkpointer(
            checkpoint_place(run_dir, config.checkpoint.directory),
            keep=config.checkpoint.keep,
            collective=collective,
            mesh={axis: getattr(shape, axis) for axis in coordinate},
            coordinate=coordinate,
            seed=config.seed,
            threads=torch.get_num_threads(),
            durable_every=(config.checkpoint.every_steps or None) if memory is not None else None,
            durable_every_s=config.checkpoint.every_s,
            memory=memory,
            timeout_s=config.parallel.timeout_s,
        ) as checkpointer,
        prefetched(source, config.data.prefetch) as stream,
    ):
        loaded = _resume(spec, checkpointer, engine, stream, say)
        if loaded is None and config.model.init_from is not None:
            taken = init_from(engine.model, config, corpus.vocab_size, collective)
            say("message", text=f"beginning with {taken}")
        done_steps = loaded.step if loaded else 0
        durable_step = on_rank0(
            collective,
            "durable",
            lambda: max((s for s in checkpointer.steps() if s <= done_steps), default=0),
        )
        sinks = open_sinks(config, run_dir, done_steps) if spec.rank == 0 else []
        run = Run(
            config=config,
            shape=shape,
            dp_rank=dp_rank,
            corpus=corpus,
            stream=stream,
            engine=engine,
            saves=Saves(
                checkpointer,
                config.checkpoint,
                say,
                durable_step,
                lambda: _memory_use(config, shape, corpus.vocab_size, memory, checkpointer),
                config.parallel.timeout_s,
            ),
            meter=step_meter(config, shape, device, corpus.vocab_size, engine.model),
            sinks=sinks,
            say=say,
            should_stop=should_stop,
            done_steps=done_steps,
        )
        try:
            finished = train(run)
        finally:
            for sink in sinks:
                sink.close()
        run.saves.tell(run.done_steps - done_steps, run.trained_s)
        if not finished:
            say("stopped", step=run.done_steps)
            return EXIT_STOPPED
        if done_steps >= config.train.steps:
            say(
                "message",
                text=f"step {done_steps} is done already and train.steps={config.train.steps}: "
                "raise train.steps to go on",
            )
        sample = _sample(run)
        nproc = spec.world_size if spec.store else None
        submitted = os.environ.get(RESUBMIT_VARIABLE)
        say("summary", lines=summarise(run, run_dir, nproc, sample, spec.launch, submitted))
        say("done", step=run.done_steps)
        return EXIT_DONE


def _snapshot_memory(config: RunConfig, spec: RankSpec) -> SlotMemory | None:
    """Where snapshots of this rank go; None where the run takes none. Raises KeeperError."""
    if config.checkpoint.memory is None:
        return None
    if spec.keeper is None:
        return ArenaMemory()
    return KeeperMemory(spec.keeper, rank=spec.rank, world_size=spec.world_size)


def _memory_use(
    config: RunConfig,
    shape: MeshShape,
    vocab_size: int,
    memory: SlotMemory | None,
    checkpointer: Checkpointer,
) -> MemoryUse:
    """What snapshots take on this node, or in this process, and what was to be expected."""
    where, ranks, used_bytes = "on rank 0", 1, checkpointer.report().reserved_bytes
    if isinstance(memory, KeeperMemory):
        status = memory.status()
        where, ranks, used_bytes = "on this node", len(status["trainers"]), status["memory_bytes"]
    predicted = None
    if config.model.factory is None:
        predicted = snapshot_memory(config, resolve_model(config.model, vocab_size), shape, ranks)
    return MemoryUse(
        where=where,
        used_bytes=used_bytes,
        predicted_bytes=None if predicted is None else predicted.node_bytes,
    )


def _choose_device(config: RunConfig, spec: RankSpec) -> torch.device:
    if spec.device is not None:
        return torch.device(spec.device)
    gpus = torch.cuda.device_count()
    if local_device(config.parallel.device, gpus, spec.local_world_size) == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", spec.local_rank)


def _join_group(config: RunConfig, spec: RankSpec, device: torch.device) -> None:
    """Join the default process group; the store outlives every rank (it is the launcher's)."""
    on_gpu = device.type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    # With its device, NCCL connects at once, and mesh axes split what is connected.
    device_id = device if on_gpu else None
    timeout = timedelta(seconds=config.parallel.timeout_s)
    if spec.store is None:
        dist.init_process_group(
            backend,
            rank=spec.rank,
            world_size=spec.world_size,
            timeout=timeout,
            device_id=device_id,
        )
        return
    host, _, port = spec.store.rpartition(":")
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host, int(port), is_master=False, timeout=timeout
    )
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(  # type: ignore[attr-defined]
            f"attempt{spec.attempt}", store
        ),
        rank=spec.rank,
        world_size=spec.world_size,
        timeout=timeout,
        device_id=device_id,
    )


def _open_corpus(config: RunConfig, run_dir: Path, collective: Collective, say: Say) -> Corpus:
    """Rank 0 tokenises what is not cached yet; then all ranks map the same file."""
    cache = run_dir / "cache"
    shown_s = time.monotonic()

    def progress(done_bytes: int, total_bytes: int) -> None:
        nonlocal shown_s
        if time.monotonic() - shown_s > PROGRESS_EVERY_S:
            shown_s = time.monotonic()
            say("message", text=f"reading the corpus: {100 * done_bytes // total_bytes} %")

    def build() -> None:
        corpus = open_corpus(config.data, cache, progress=progress, leave_out=run_dir)
        if config.train.eval_batches:
            check_held_out_fits(corpus, config.data)
        left_out = f", {len(corpus.skipped)} files left out" if corpus.skipped else ""
        documents = "" if corpus.documents is None else f"{corpus.documents:,} documents, "
        say(
            "message",
            text=f"corpus: {corpus.name}, {documents}{corpus.tokens_train.size:,} training "
            f"tokens{left_out}",
        )
        if corpus.bad_rows:
            examples = [example for part in corpus.parts for example in part.bad_examples]
            shown = f", such as {examples[0]}" if examples else ""
            say("message", text=f"corpus: {corpus.bad_rows:,} bad rows skipped{shown}")

    on_rank0(collective, "corpus", build)
    return open_corpus(config.data, cache, build=False, leave_out=run_dir)


def _resume(
    spec: RankSpec,
    checkpointer: Checkpointer,
    engine: TorchEngine,
    stream: BatchStream,
    say: Say,
) -> StepInfo | None:
    if spec.resume == "never":
        if (latest := checkpointer.latest()) is not None:
            raise CheckpointError(
                f"{spec.run_dir} holds checkpoints up to step {latest}, and --resume never would "
                "leave them behind: choose another --run-dir, or --resume auto to go on"
            )
        return None
    step = None if spec.resume == "auto" else int(spec.resume)
    steps = checkpointer.steps() if spec.rank == 0 else []  # only rank 0 tells of them
    told = transfer_teller(say, "loading a checkpoint")
    checkpointer.load(engine.state(stream), step, on_bytes=told)
    info = checkpointer.loaded
    if info is not None:
        engine.follow_config()
        where = info.path.removesuffix(f" (step {info.step})")
        say("resumed", step=info.step, path=where, why=info.why)
        if left := [s for s in steps if s > info.step]:
            say(
                "message",
                text=f"going on from step {info.step}: the first save from here deletes the later "
                f"{'steps' if len(left) > 1 else 'step'} {', '.join(map(str, left))} of this run "
                "directory (to keep them, copy it first)",
            )
        if not info.rng_restored:
            say(
                "message",
                text="the checkpoint is from another mesh: torch's random generators start anew "
                "from (seed, step, mesh coordinate)",
            )
    return info


def _sample(run: Run) -> str | None:
    """Text that the model writes after a short prompt; None where none was asked for."""
    n_tokens = run.config.train.sample_tokens
    if not n_tokens:
        return None
    run.say("message", text=f"writing {n_tokens} tokens of text as a sample")
    prompt = run.corpus.encode(SAMPLE_PROMPT)
    with torch.compiler.set_stance("force_eager"):  # windows grow: each would be compiled anew
        ids = generate(
            run.engine.logits_at,
            prompt,
            n_tokens,
            temperature=0.7,
            seed=run.config.seed,
            seq_len=run.config.data.seq_len,
            vocab_size=run.corpus.vocab_size,
            tp=run.shape.tp,
            should_stop=run.should_stop,
        )
    return run.corpus.decode(ids)


def _mute(kind: str, **facts: Any) -> None:
    """Only rank 0 reports progress; errors of every rank are reported by its launcher."""
