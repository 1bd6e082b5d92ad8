"""What the snapshot benchmark measures, and in which order (pure; no torch)."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

RANKS = 2
KEEPER, PROCESS = "keeper", "process"
"""Where everstep's slots may be: in a keeper's memory, or in that of the trainer itself."""

NONE, COPY, MEMORY, DURABLE = "none", "copy_floor", "memory", "durable"
DISK = "disk_floor"
DCP_BEST, DCP_BEST_5, DCP_STAGING = "dcp_best", "dcp_best_every_5", "dcp_staging"
DCP_DEFAULT, DCP_SYNC, TORCH, DLROVER = "dcp_default", "dcp_sync", "torch_save", "dlrover"


@dataclass(frozen=True, kw_only=True)
class Size:
    """A Llama's widths, and the tokens of one rank per step."""

    dim: int
    layers: int
    heads: int
    ffn_dim: int
    vocab: int
    batch: int
    seq_len: int


FULL = Size(dim=768, layers=12, heads=12, ffn_dim=2048, vocab=16384, batch=1, seq_len=160)
QUICK = Size(dim=384, layers=8, heads=6, ffn_dim=1024, vocab=8192, batch=1, seq_len=160)
TINY = Size(dim=32, layers=2, heads=2, ffn_dim=64, vocab=64, batch=1, seq_len=16)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How often a way acts and how long its blocks are."""

    label: str
    """For people."""
    pattern: tuple[bool, ...] = (True,)
    """At which steps of a period it takes a snapshot."""
    paired: bool = False
    """Its work ends with the step that follows: steps of its block without a snapshot are what
    those with one are compared with, rather than the blocks around it."""
    rests: bool = False
    """Its work is spread over a period: it is at rest before a block's first measured step."""
    warm_up: int = 1
    """Steps at the head of a block that do not count: memory is touched, plans are made."""
    measured: int = 3

    def __post_init__(self) -> None:
        if self.measured % self.period:
            raise ValueError(f"{self.label}: a block does not hold whole periods")

    @property
    def period(self) -> int:
        """Steps after which its work repeats."""
        return len(self.pattern)

    def takes(self, number: int) -> bool:
        """Whether it takes a snapshot before step ``number`` of the measured ones, from 0."""
        return self.pattern[number % self.period]


IN_PAIRS = (True, False, False, True)
"""Of a period, neither half is the later one: a machine that slows down slows both alike."""
EVERY = (True,) * 5
ONE_OF_5 = (True, *(False,) * 4)
PLANS = {
    NONE: Plan(label="no snapshots", measured=2),
    COPY: Plan(label="copy floor: one memcpy", pattern=IN_PAIRS, paired=True, measured=12),
    DISK: Plan(label="memcpy + raw write every 5", pattern=EVERY, rests=True, measured=5),
    MEMORY: Plan(label="everstep, memory", pattern=IN_PAIRS, paired=True, warm_up=2, measured=12),
    DURABLE: Plan(
        label="everstep, memory + durable every 5",
        pattern=EVERY,
        rests=True,
        warm_up=2,
        measured=5,
    ),
    DCP_BEST: Plan(label="DCP async, best mode"),
    DCP_BEST_5: Plan(
        label="DCP async, best mode, every 5", pattern=ONE_OF_5, rests=True, measured=5
    ),
    DCP_STAGING: Plan(label="DCP staging only"),
    DCP_DEFAULT: Plan(label="DCP async, defaults"),
    DCP_SYNC: Plan(label="DCP save"),
    TORCH: Plan(label="torch.save to tmpfs"),
    DLROVER: Plan(label="DLRover Flash Checkpoint, memory"),
}
"""Every way, in the order in which results are shown."""
CLOSELY = (COPY, MEMORY, DISK, DURABLE)
"""Ways that take a block in every round: their small differences are to be seen."""


def ways_of_round(
    number: int, peers_per_round: int, missing: Collection[str] = ()
) -> tuple[str, ...]:
    """The ways with a block in round ``number``, from 0, in the order of that round.

    Peers take turns; every second round goes backwards.
    """
    peers = [way for way in PLANS if way not in (NONE, *CLOSELY, *missing)]
    begin = number * peers_per_round
    taken = [peers[(begin + i) % len(peers)] for i in range(min(peers_per_round, len(peers)))]
    ways = _shuffled([way for way in CLOSELY if way not in missing], taken)
    return tuple(ways if number % 2 == 0 else ways[::-1])


def _shuffled(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """One of the first, one of the second, and so on; what is left comes last."""
    short = min(len(first), len(second))
    mixed = [way for pair in zip(first, second, strict=False) for way in pair]
    return [*mixed, *first[short:], *second[short:]]
