"""The configuration of one run: one YAML file is one complete run.

Frozen pydantic models; every field has its unit and meaning in its description. Loading files,
overrides and error messages live in ``config_load.py``.
"""

import difflib
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

AUTO: Final = "auto"
Auto = Literal["auto"]
Precision = Literal["fp32", "bf16"]
DataFormat = Literal["auto", "text", "jsonl", "parquet", "hf", "tokens"]
PipelineSchedule = Literal["1f1b", "interleaved", "zero_bubble"]


Positive = Annotated[int, Field(ge=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all sections: immutable; unknown keys, infinity and NaN are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class TrainConfig(Section):
    """How long to train and what to do along the way."""

    steps: int = Field(ge=1)
    """Number of optimizer updates in the whole run."""
    eval_every: int = Field(default=0, ge=0)
    """Evaluate on the held-out split every this many steps; 0 = only at the end."""
    eval_batches: int = Field(default=8, ge=0)
    """Global batches per evaluation; 0 = never evaluate."""
    sample_tokens: int = Field(default=0, ge=0)
    """Tokens of text to generate at the end of the run, as a look at what was learnt; 0 = none."""
    grace_s: float = Field(default=60.0, gt=0)
    """Seconds that a run asked to stop may take to finish its step and save."""


class ModelConfig(Section):
    """The built-in Llama-style decoder, or a model of your own through ``factory``."""

    factory: str | None = None
    """'pkg.module:function' that returns an nn.Module mapping tokens (B, L) to logits (B, L, V)."""
    factory_args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for ``factory``; it also gets ``vocab_size`` and ``seq_len``."""
    init_from: str | None = None
    """Weights to begin with: a folder with config.json and safetensors, a safetensors file, or the
    path or URL of a run, checkpoint directory or step of everstep (RUN@200: that step). Resuming a
    run takes that run's own instead."""
    vocab_size: Positive | Auto = AUTO
    """Rows of the embedding; auto = the tokenizer's, rounded up to a multiple of 64."""
    dim: int = Field(default=256, ge=1)
    """Width of the residual stream."""
    layers: int = Field(default=4, ge=1)
    """Number of decoder blocks."""
    heads: int = Field(default=8, ge=1)
    """Query heads; ``dim`` is a multiple of it."""
    kv_heads: Positive | Auto = AUTO
    """Key/value heads (grouped-query attention); auto = ``heads``."""
    ffn_dim: Positive | Auto = AUTO
    """Hidden width of SwiGLU; auto = 8/3 of ``dim``, rounded up to a multiple of 64."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """Base of the rotary position frequencies."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Epsilon of RMSNorm."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights (output projections: divided by sqrt(2 layers))."""
    tie_embeddings: bool = False
    """Use the input embedding as the output head."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Residual dropout; a pure function of seed and position, hence the same on every layout."""

    @model_validator(mode="after")
    def _shapes_fit(self) -> "ModelConfig":
        if self.dim % self.heads:
            raise ValueError(f"model.dim={self.dim} is not a multiple of model.heads={self.heads}")
        if (self.dim // self.heads) % 2:
            raise ValueError(
                f"model.dim/model.heads = {self.dim // self.heads} is odd; rotary positions need "
                "an even head width"
            )
        if self.kv_heads != AUTO and self.heads % self.kv_heads:
            raise ValueError(
                f"model.heads={self.heads} is not a multiple of model.kv_heads={self.kv_heads}"
            )
        return self


class SourceConfig(Section):
    """One source of a mixture, or one that needs more said about it than its path."""

    path: str | list[str]
    """Files, folders, globs, or URLs of these (s3://, https://, ...); or 'stdlib'."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the samples that come from this source, relative to the other weights."""
    format: DataFormat = AUTO
    """auto = by suffix and contents; tokens = folders of ``everstep data tokenize``, .npy, .bin."""
    text_key: str = Field(default="text", min_length=1)
    """Name of the field (jsonl) or column (parquet, hf) that holds the text."""
    on_bad_rows: Literal["error", "skip"] = "error"
    """What to do with rows that are malformed or have no text: stop, or skip and report them."""
    token_dtype: Literal["uint16", "uint32"] | None = None
    """Type of the tokens in raw .bin files, which do not tell it."""
    storage_options: dict[str, Any] = Field(default_factory=dict)
    """Options of the URL's fsspec file system; '$NAME' is taken from the environment."""


def _parse_entries(value: Any, rest: ValidatorFunctionWrapHandler) -> Any:
    """Entries of ``data.source`` one by one, so that an error says which key of which is wrong."""
    if not isinstance(value, list) or not any(isinstance(item, dict) for item in value):
        return rest(value)
    return [_parse_entry(item, f"data.source[{number}]") for number, item in enumerate(value)]


def _parse_entry(item: Any, name: str) -> SourceConfig:
    if isinstance(item, SourceConfig):
        return item
    if not isinstance(item, dict):
        raise ValueError(
            f"{name}: got {item!r} beside entries with keys; write {{path: {item}}}, or only paths"
        )
    for key, entry in item.items():
        if isinstance(entry, bool) and key in SourceConfig.model_fields:
            raise ValueError(f"{name}.{key}: got {str(entry).lower()}, which it cannot be")
    try:
        return SourceConfig.model_validate(item)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key, message = str(first["loc"][0]), first["msg"]
    if key not in SourceConfig.model_fields:
        near = difflib.get_close_matches(key, SourceConfig.model_fields, n=1)
        hint = f"did you mean {near[0]}?" if near else ""
        known = hint or f"the keys there are {', '.join(SourceConfig.model_fields)}"
        raise ValueError(f"unknown key {name}.{key}; {known}")
    if key not in item:
        raise ValueError(f"{name}.{key} is missing, expected files, folders, globs or URLs")
    raise ValueError(f"{name}.{key}: got {item[key]!r}: {message[:1].lower()}{message[1:]}")


class DataConfig(Section):
    """Where tokens come from and how they are cut into batches."""

    source: Annotated[str | list[str] | list[SourceConfig], WrapValidator(_parse_entries)] = (
        "stdlib"
    )
    """'stdlib' (sources of the Python standard library), files, folders, globs, URLs, or entries
    {path, weight, format, text_key, ...}: a mixture; docs/data.md shows each."""
    tokenizer: str = "bytes"
    """'bytes', the path of a Hugging Face ``tokenizer.json``, or 'auto': that of a folder made by
    ``everstep data tokenize`` in ``source``."""
    seq_len: int = Field(default=256, ge=2)
    """Tokens per sample."""
    global_batch: int = Field(default=16, ge=1)
    """Samples per optimizer update, over all ranks."""
    micro_batch: Positive | Auto = AUTO
    """Samples per rank and forward pass; auto = all of the rank's share (no accumulation), in a
    pipeline the largest size that makes 2 x mesh.pp micro-batches or more, if there are as many."""
    document_mask: bool = False
    """Attention stays inside of documents; its mask takes seq_len x seq_len bytes per sample."""
    held_out: float = Field(default=0.02, ge=0, lt=0.5)
    """Fraction of the tokens kept out of training for evaluation."""
    prefetch: int = Field(default=2, ge=0)
    """Steps whose batches a thread assembles ahead; 0 = none. Never changes what is trained on."""


class OptimConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Shape after warm-up: cosine decay, warm-up-stable-decay, or constant."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up from 0."""
    decay_steps: Annotated[int, Field(ge=0)] | Auto = AUTO
    """Length of the final decay: auto = all steps after warm-up (cosine), a fifth of them (wsd)."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end, as a fraction of the peak."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay rates of AdamW's moments."""
    eps: float = Field(default=1e-8, gt=0)
    """Epsilon of AdamW."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay, on tensors of two or more dims only."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 = never clip."""


class MeshConfig(Section):
    """Sizes of the mesh axes; their product is the number of ranks."""

    pp: int = Field(default=1, ge=1)
    """Pipeline ranks: each holds some of the layers (see parallel.pipeline_schedule)."""
    dp_replicate: int = Field(default=1, ge=1)
    """Replicas of the sharded model (HSDP)."""
    dp_shard: Positive | Auto = AUTO
    """Ranks that share parameters, gradients and optimizer state (FSDP2); auto = what is left."""
    tp: int = Field(default=1, ge=1)
    """Tensor parallel ranks, with sequence parallelism."""
    cp: int = Field(default=1, ge=1)
    """Reserved for context parallelism."""
    ep: int = Field(default=1, ge=1)
    """Reserved for expert parallelism."""


class ParallelConfig(Section):
    """How the model is executed on the mesh."""

    precision: Precision = "fp32"
    """Compute type; bf16 keeps fp32 parameters, optimizer state and gradient reduction."""
    matmul_precision: Literal["fp32", "tf32"] = "fp32"
    """How GPUs multiply fp32 matrices; tf32 is several times faster and rounds to 10 bits."""
    deterministic: bool = False
    """Only GPU kernels that give the same bits each time: slower, and needed for exact resume."""
    activation_checkpointing: bool = False
    """Recompute each block's activations in backward instead of keeping them."""
    compile: bool = False
    """Run each block through ``torch.compile`` in training and evaluation."""
    pipeline_schedule: PipelineSchedule = "1f1b"
    """With mesh.pp > 1: 1f1b, interleaved (several stages per rank), or zero_bubble (weight
    gradients fill the idle time; keeps more activations)."""
    stages_per_rank: Positive | Auto = AUTO
    """Pipeline stages per rank; auto = 1 for 1f1b, 2 for interleaved and zero_bubble."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = CUDA where torch finds it, else CPU."""
    threads: Positive | Auto = AUTO
    """CPU threads per rank; auto = cores / ranks on this host, at least 1."""
    timeout_s: float = Field(default=600.0, gt=0, le=1_000_000)
    """Longest time that a collective may take before the rank gives up; clocks in nanoseconds and
    timers in 32-bit milliseconds overflow with much more than the maximum, 11 days."""


class CheckpointConfig(Section):
    """What is kept of the training state: a snapshot of every step in memory, some on storage."""

    every_steps: int = Field(default=100, ge=0)
    """Save to storage after every this many steps; 0 = not by steps. The last step is saved anyway,
    and the one after which the run was asked to stop."""
    every_s: Annotated[float, Field(gt=0)] | None = None
    """Save to storage when the newest step there is this many seconds old; nothing = by steps only.
    Needs snapshots (checkpoint.memory)."""
    keep: int = Field(default=3, ge=1)
    """Newest checkpoints kept; older ones are deleted."""
    directory: str | None = None
    """Where checkpoints live: a path (below the run directory, if it is relative) or the URL of any
    fsspec file system, such as s3://bucket/run7; nothing = checkpoints. Credentials and endpoints
    come from the environment, as the file system's library reads it."""
    memory: Literal["keeper", "process"] | None = "keeper"
    """Where snapshots of every step are: keeper = with a process on each node that outlives the
    ranks, so that none is lost when they are killed; process = in the ranks, so that saving does
    not hold up training; nothing = no snapshots, and training waits for each save."""
    memory_budget_bytes: Annotated[int, Field(ge=2**20)] | None = None
    """Most host memory for snapshots on each node, or the run is refused; nothing = 80 % of what is
    available when it starts. `everstep doctor CONFIG` computes the need."""
    keeper_linger_s: float = Field(default=600.0, ge=0, le=86400)
    """How long keepers hold their snapshots for the next start after a run has failed or was
    killed."""
    keeper_interface: str | None = None
    """Network interface for reading the snapshots of other nodes, after ranks have moved; nothing =
    the one that has the node's address in the Ray cluster, and none where all ranks share a
    host."""

    @model_validator(mode="after")
    def _seconds_need_snapshots(self) -> "CheckpointConfig":
        if self.every_s is not None and self.memory is None:
            raise ValueError(
                f"checkpoint.every_s={self.every_s:g} needs snapshots, and checkpoint.memory is "
                "null: set checkpoint.memory=keeper, or use checkpoint.every_steps"
            )
        return self


class MetricsConfig(Section):
    """Where numbers go."""

    sinks: list[str] = Field(default_factory=lambda: ["jsonl"])
    """Any of 'jsonl', 'tensorboard', 'pkg.module:factory'."""


class LaunchConfig(Section):
    """How ranks are started, on this host (``local``) or in a Ray cluster (``ray``)."""

    port: int = Field(default=0, ge=0, le=65535)
    """Port of the rendezvous store; 0 = any free one."""
    address: str | None = None
    """Ray cluster to join: 'host:port', or 'auto' for the one this host is part of; none = the one
    that the variable RAY_ADDRESS names, or else a Ray of this run's own, on this host."""
    simulated_nodes: int = Field(default=1, ge=1)
    """Nodes that a Ray of this run's own pretends to have."""
    placement: Literal["pack", "spread", "strict_pack", "strict_spread"] = "pack"
    """How Ray lays ranks on nodes: as few or as many nodes as possible; strict = or not at all."""
    cpus_per_rank: float = Field(default=1.0, ge=0)
    """Logical CPUs that Ray reserves for each rank."""
    resources_per_rank: dict[str, float] = Field(default_factory=dict)
    """Custom resources that Ray reserves for each rank; CPUs and GPUs are none of them."""
    failure_domain_label: str | None = None
    """Label of Ray's nodes that says what fails together (rack, switch); none = each on its own."""
    place_timeout_s: float = Field(default=300.0, gt=0)
    """Seconds to wait for resources of a Ray cluster that others use now."""
    wait_for_nodes: bool = False
    """Wait for resources that a Ray cluster does not have yet, too: its autoscaler adds nodes."""
    max_restarts: int = Field(default=3, ge=0)
    """How often in a row all ranks are started again after one was killed or lost (out of memory, a
    node that died); ten minutes of training begin a new row. Errors that a rank raises itself are
    not tried again, and torchrun and srun restart ranks by rules of their own. 0 = never."""
    drill_kill_step: int = Field(default=0, ge=0)
    """A fire drill: when this step has been done, all ranks are killed, once; 0 = never."""

    @model_validator(mode="after")
    def _resources_can_be_reserved(self) -> "LaunchConfig":
        for name, amount in self.resources_per_rank.items():
            if amount < 0:
                raise ValueError(
                    f"launch.resources_per_rank.{name}: got {amount:g}, expected a number >= 0"
                )
            if name in ("CPU", "GPU"):
                raise ValueError(
                    f"launch.resources_per_rank names {name}, which is reserved without it: set "
                    "launch.cpus_per_rank for CPUs; a rank on GPUs has one"
                )
        return self

    @model_validator(mode="after")
    def _a_drill_can_be_survived(self) -> "LaunchConfig":
        if self.drill_kill_step and not self.max_restarts:
            raise ValueError(
                f"launch.drill_kill_step={self.drill_kill_step} kills all ranks, and "
                "launch.max_restarts=0 would not start them again: allow a restart"
            )
        return self


class RunConfig(Section):
    """One complete run."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run, and of its default directory ``runs/NAME``."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of initial weights, data order and dropout."""
    train: TrainConfig
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    launch: LaunchConfig = LaunchConfig()
