"""What blocks of the snapshot benchmark amount to (pure), its table and its plot."""

import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress, cycle
from operator import not_
from pathlib import Path
from typing import Any

from snapshot_inflation_turns import COPY, DISK, DURABLE, MEMORY, NONE, PLANS

RESAMPLES = 2000
MAIN_THREAD = ("save_s", "save_cpu_s", "fence_s", "fence_cpu_s")
"""What a rank tells of its main thread, for each step."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some steps with snapshots taken one way."""

    way: str
    round: int
    ranks: list[dict[str, Any]]
    """What ``Worker.block`` found on each."""

    @property
    def steps_s(self) -> list[float]:
        """Of each step, the mean of the ranks."""
        return [statistics.mean(ranks) for ranks in self._by_step("step_s")]

    @property
    def steps_cpu_s(self) -> list[float]:
        """Of each step, all processes."""
        both = zip(self._by_step("cpu_s"), self._by_step("helpers_cpu_s"), strict=True)
        return [sum(own) + sum(helpers) for own, helpers in both]

    @property
    def counted(self) -> list[bool]:
        """Which of its steps make up its figures: where some have no snapshot to compare the
        others with, the others; else all, as what repeats every few steps counts by its share."""
        plan, steps = PLANS[self.way], len(self.ranks[0]["step_s"])
        return [not plan.paired or plan.takes(number) for number in range(steps)]

    @property
    def snapshots(self) -> int:
        """How many it asked for."""
        return sum(map(PLANS[self.way].takes, range(len(self.ranks[0]["step_s"]))))

    @property
    def step_s(self) -> float:
        """The mean of the steps that count."""
        return statistics.mean(compress(self.steps_s, self.counted))

    def _by_step(self, name: str) -> Iterator[tuple[float, ...]]:
        return zip(*(rank[name] for rank in self.ranks), strict=True)

    @property
    def peak_bytes(self) -> int:
        """The peaks of all ranks."""
        return sum(rank["peak_bytes"] for rank in self.ranks)

    @property
    def unmapped_bytes(self) -> int:
        """Shared memory of the machine beyond what ranks have mapped (that is in their peaks)."""
        mapped_bytes = sum(rank["mapped_shared_bytes"] for rank in self.ranks)
        return max(0, max(rank["shared_bytes"] for rank in self.ranks) - mapped_bytes)

    @property
    def helpers_bytes(self) -> int:
        """Private memory of processes beside the ranks."""
        return sum(rank["helpers_bytes"] for rank in self.ranks)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A block between two without snapshots."""

    before: Block
    block: Block
    after: Block

    @property
    def inflations(self) -> list[float]:
        """Step time with snapshots over that without, minus one: of each period where a way is
        compared with steps inside of its block, else of the block over its neighbours."""
        return self._inflations([block.steps_s for block in (self.before, self.block, self.after)])

    @property
    def cpu_inflations(self) -> list[float]:
        """The same of CPU time."""
        blocks = (self.before, self.block, self.after)
        return self._inflations([block.steps_cpu_s for block in blocks])

    def _inflations(self, steps_s: Sequence[Sequence[float]]) -> list[float]:
        before_s, block_s, after_s = steps_s
        plan = PLANS[self.block.way]
        if not plan.paired:
            around_s = (statistics.mean(before_s) + statistics.mean(after_s)) / 2
            return [statistics.mean(block_s) / around_s - 1]
        found = []
        for begin in range(0, len(block_s), plan.period):
            period_s = block_s[begin : begin + plan.period]
            taken = statistics.mean(compress(period_s, plan.pattern))
            others = statistics.mean(compress(period_s, map(not_, plan.pattern)))
            found.append(taken / others - 1)
        return found

    @property
    def extra_bytes(self) -> int:
        """Memory of the machine that it took at most beyond what training takes."""
        around_bytes = (self.before.peak_bytes + self.after.peak_bytes) // 2
        held_bytes = self.block.peak_bytes + self.block.unmapped_bytes + self.block.helpers_bytes
        return held_bytes - around_bytes


def trials_of(blocks: Sequence[Block]) -> dict[str, list[Trial]]:
    """Blocks in the order in which they ran, as trials by way."""
    found: dict[str, list[Trial]] = {}
    for before, block, after in zip(blocks, blocks[1:], blocks[2:], strict=False):
        if before.way == NONE and block.way != NONE and after.way == NONE:
            trial = Trial(before=before, block=block, after=after)
            found.setdefault(block.way, []).append(trial)
    return {way: found[way] for way in PLANS if way in found}


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile; of one value, itself."""
    if len(values) == 1:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def interval(values: Sequence[float]) -> list[float]:
    """The 95 % percentile-bootstrap interval of the median (Efron 1979), the same every time."""
    draw = random.Random(0)
    medians = [statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES)]
    bounds = statistics.quantiles(medians, n=40, method="inclusive")
    return [bounds[0], bounds[-1]]


def summary(way: str, trials: Sequence[Trial], state_bytes: int) -> dict[str, Any]:
    """The figures of one way; ``state_bytes`` is the state of all ranks."""
    plan = PLANS[way]
    inflations = [inflation for trial in trials for inflation in trial.inflations]
    blocks = [trial.block for trial in trials]
    ranks = [rank for block in blocks for rank in block.ranks]
    extra_bytes = statistics.median(trial.extra_bytes for trial in trials)
    return {
        "label": plan.label,
        "pattern": list(map(int, plan.pattern)),
        "inflation": statistics.median(inflations),
        "inflation_quartiles": quartiles(inflations),
        "inflation_interval_95": interval(inflations),
        "inflation_samples": inflations,
        "step_s_quartiles": quartiles([block.step_s for block in blocks]),
        "cpu_inflation_quartiles": quartiles(
            [inflation for trial in trials for inflation in trial.cpu_inflations]
        ),
        "cpu_s_per_step": {
            **{
                f"rank {i}": statistics.median(
                    statistics.mean(compress(block.ranks[i]["cpu_s"], block.counted))
                    for block in blocks
                )
                for i in range(len(blocks[0].ranks))
            },
            "others": statistics.median(
                sum(statistics.mean(rank["helpers_cpu_s"]) for rank in block.ranks)
                for block in blocks
            ),
        },
        "main_thread_per_snapshot": {
            name: quartiles(
                [s for rank in ranks for s in compress(rank[name], cycle(plan.pattern))]
            )
            for name in MAIN_THREAD
        },
        "extra_memory_bytes": extra_bytes,
        "extra_memory_of_state": extra_bytes / state_bytes,
        "snapshots": sum(block.snapshots for block in blocks),
        "skipped": sum(block.ranks[0]["skipped"] for block in blocks),
    }


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One claim and what was found."""

    claim: str
    found: float
    limit: float

    @property
    def met(self) -> bool:
        """Whether it is at most the limit."""
        return self.found <= self.limit


def goals(ways: Mapping[str, Mapping[str, Any]]) -> list[Goal]:
    """What is to be shown, as far as it was measured."""
    shown = []
    for way, slots in ((MEMORY, 2), (DURABLE, 3)):
        if way not in ways:
            continue
        label, found = PLANS[way].label, ways[way]
        shown.append(Goal(claim=f"{label}: inflation", found=found["inflation"], limit=0.07))
        for floor, name in ((COPY, "copy"), (DISK, "disk")):
            if floor in ways and (floor == COPY or way == DURABLE):
                beyond = found["inflation"] - 1.5 * ways[floor]["inflation"]
                claim = f"{label}: inflation beyond 1.5 {name} floors"
                shown.append(Goal(claim=claim, found=beyond, limit=0.0))
        save_s = found["main_thread_per_snapshot"]["save_s"][1]
        shown.append(Goal(claim=f"{label}: seconds in save", found=save_s, limit=0.005))
        shown.append(
            Goal(
                claim=f"{label}: memory, in states",
                found=found["extra_memory_of_state"],
                limit=slots + 0.2,
            )
        )
        shown.append(
            Goal(
                claim=f"{label}: share skipped",
                found=found["skipped"] / found["snapshots"],
                limit=0,
            )
        )
    return shown


def print_report(
    ways: Mapping[str, Mapping[str, Any]], without: Mapping[str, Any], shown: Sequence[Goal]
) -> None:
    """A table for people."""
    low, middle, high = without["step_s_quartiles"]
    print(f"\nstep without snapshots {middle:.3f} s [{low:.3f}, {high:.3f}]")
    print(
        f"{'':38}{'step time, median':>18}{'quartiles':>18}{'95 % of median':>18}"
        f"{'CPU':>8}{'save ms':>9}{'fence ms':>9}{'memory':>8}"
    )
    for found in ways.values():
        main_thread = found["main_thread_per_snapshot"]
        print(
            f"  {found['label']:36}{_percent(found['inflation']):>18}"
            f"{_range(found['inflation_quartiles'][::2]):>18}"
            f"{_range(found['inflation_interval_95']):>18}"
            f"{_percent(found['cpu_inflation_quartiles'][1]):>8}"
            f"{1e3 * main_thread['save_s'][1]:9.1f}{1e3 * main_thread['fence_s'][1]:9.1f}"
            f"{found['extra_memory_of_state']:7.2f}x"
            + (f"  {found['skipped']:.0f} skipped" if found["skipped"] else "")
        )
    print("\ngoals")
    for goal in shown:
        word = "met   " if goal.met else "MISSED"
        print(f"  {word} {goal.claim}: {goal.found:.4g}, wanted <= {goal.limit:g}")


def _percent(fraction: float) -> str:
    return f"{100 * fraction:+.1f} %"


def _range(bounds: Sequence[float]) -> str:
    return f"{100 * bounds[0]:+.1f} .. {100 * bounds[1]:+.1f}"


def plot(ways: Mapping[str, Mapping[str, Any]], title: str, path: Path) -> None:
    """Bars of the medians: step time with a dot per sample, CPU time, memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, places = pyplot.subplots(1, 3, figsize=(16, 5), sharey=True, layout="constrained")
    panels = (
        ("step time added, %", [100 * found["inflation"] for found in ways.values()]),
        (
            "CPU time added, %, all processes",
            [100 * found["cpu_inflation_quartiles"][1] for found in ways.values()],
        ),
        (
            "memory added, in sizes of the state",
            [found["extra_memory_of_state"] for found in ways.values()],
        ),
    )
    for place, (label, values) in zip(places, panels, strict=True):
        place.barh(range(len(ways)), values, color=[_colour(way) for way in ways])
        place.grid(axis="x", alpha=0.3)
        place.set_title(label, fontsize=10)
    for y, found in enumerate(ways.values()):
        dots = [100 * inflation for inflation in found["inflation_samples"]]
        places[0].plot(dots, [y] * len(dots), "k.", markersize=3)
    places[0].set_yticks(range(len(ways)), [found["label"] for found in ways.values()])
    places[0].invert_yaxis()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _colour(way: str) -> str:
    if way == COPY:
        return "0.6"
    if way in (MEMORY, DURABLE):
        return "tab:green"
    return "tab:red" if way.startswith("dcp") else "tab:blue"
