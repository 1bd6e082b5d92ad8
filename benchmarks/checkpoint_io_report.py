"""Medians, ratios and goals of the checkpoint benchmark (pure), its tables and its plot."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from checkpoint_io_turns import (
    BOXES,
    COLD,
    DCP,
    DCP_SAFETENSORS,
    DCP_THREADS,
    LAYOUTS,
    MEMCPY,
    ONE,
    OURS,
    RAW,
    ROWS,
    SAVE,
    STRIDED,
    TP,
    UNCHECKED,
    WARM,
    Turn,
)

RESHARDED = (BOXES, TP, ONE)


@dataclass(frozen=True)
class Samples:
    """What the rounds found for one turn, in order of rounds."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    """Of all ranks together."""
    syncs: list[int] = field(default_factory=list)
    resident: list[float] = field(default_factory=list)
    """Share of the files in the page cache when a load began; empty for a save."""


Found = Mapping[Turn, Samples]


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile; of one value, itself."""
    if len(values) == 1:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def ratios(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Quartiles of first / second, round by round."""
    return quartiles([a / max(b, 1e-9) for a, b in zip(first, second, strict=True)])


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One claim and what was found; the median decides."""

    claim: str
    found: list[float]
    """Quartiles over the rounds."""
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the median is on the right side of the limit."""
        return self.found[1] >= self.limit if self.at_least else self.found[1] <= self.limit


def goals(found: Found, plan_s: Sequence[float]) -> list[Goal]:
    """What is to be shown, from samples that hold every turn."""

    def at(kind: str, way: str, source: str, layout: str) -> Samples:
        return found[Turn(kind=kind, way=way, source=source, layout=layout)]

    shown = [
        Goal(
            claim=f"save, {layout}: throughput as a share of the raw write's",
            found=ratios(
                at(SAVE, RAW, layout, layout).wall_s, at(SAVE, OURS, layout, layout).wall_s
            ),
            limit=0.9,
            at_least=True,
        )
        for layout in (ROWS, ONE)
    ]
    for layout in RESHARDED:
        same = ONE if layout == ONE else ROWS  # as many ranks load
        for kind, figure in ((WARM, "cpu_s"), (WARM, "wall_s"), (COLD, "wall_s")):
            resharded = getattr(at(kind, OURS, ROWS, layout), figure)
            straight = getattr(at(kind, OURS, same, same), figure)
            shown.append(
                Goal(
                    claim=f"{kind}, {ROWS} -> {layout}: {figure} over that of {same} -> {same}",
                    found=ratios(resharded, straight),
                    limit=1.1,
                )
            )
    for layout in RESHARDED:
        memcpy = at(WARM, MEMCPY, *(2 * [ONE if layout == ONE else ROWS])).cpu_s
        for way, limit in ((UNCHECKED, 3.0), (OURS, 4.0)):
            shown.append(
                Goal(
                    claim=f"{WARM}, {ROWS} -> {layout}, {way}: CPU over memcpy's",
                    found=ratios(at(WARM, way, ROWS, layout).cpu_s, memcpy),
                    limit=limit,
                )
            )
        shown += [
            Goal(
                claim=f"{WARM}, {ROWS} -> {layout}: CPU of {peer} over ours",
                found=ratios(
                    at(WARM, peer, ROWS, layout).cpu_s, at(WARM, OURS, ROWS, layout).cpu_s
                ),
                limit=5.0,
                at_least=True,
            )
            for peer in (DCP, DCP_SAFETENSORS)
        ]
    shown.append(
        Goal(claim="plan of one rank's load, CPU seconds", found=quartiles(plan_s), limit=1.0)
    )
    return shown


def beside_strided(found: Found) -> dict[str, list[float]]:
    """Quartiles of CPU over that of the strided copy, which no load on these layouts can beat."""

    def cpu_s(way: str, layout: str) -> list[float]:
        return found[Turn(kind=WARM, way=way, source=ROWS, layout=layout)].cpu_s

    return {
        f"{WARM}, {ROWS} -> {layout}, {way}: CPU over the strided copy's": ratios(
            cpu_s(way, layout), cpu_s(STRIDED, layout)
        )
        for layout in (BOXES, TP)
        for way in (UNCHECKED, OURS)
    }


def rows_of(found: Found, size_bytes: int) -> list[dict[str, Any]]:
    """For each turn its samples and their quartiles, for the results file."""
    return [
        {
            **asdict(turn),
            "wall_s_quartiles": quartiles(samples.wall_s),
            "cpu_s_quartiles": quartiles(samples.cpu_s),
            "gb_per_wall_s": size_bytes / statistics.median(samples.wall_s) / 1e9,
            "samples": asdict(samples),
        }
        for turn, samples in found.items()
    ]


def print_report(found: Found, size_bytes: int, shown: Sequence[Goal]) -> None:
    """Tables for people."""
    for group in dict.fromkeys(turn.group for turn in found):
        print(f"\n{group}")
        for turn, samples in found.items():
            if turn.group == group:
                wall, cpu = quartiles(samples.wall_s), quartiles(samples.cpu_s)
                print(
                    f"  {turn.label:34} {wall[1]:7.3f} s [{wall[0]:.3f}, {wall[2]:.3f}]"
                    f" {size_bytes / wall[1] / 1e9:6.2f} GB/s"
                    f"   CPU {cpu[1]:7.3f} s [{cpu[0]:.3f}, {cpu[2]:.3f}]"
                    f"   {statistics.median(samples.syncs):.0f} syncs"
                )
    print("\ngoals (median [quartiles] over rounds)")
    for goal in shown:
        low, middle, high = goal.found
        print(
            f"  {'met   ' if goal.met else 'MISSED'} {goal.claim}: {middle:.2f}"
            f" [{low:.2f}, {high:.2f}], wanted {'>=' if goal.at_least else '<='} {goal.limit:g}"
        )
    print("\nbeside the copies alone (median [quartiles] over rounds)")
    for claim, (low, middle, high) in beside_strided(found).items():
        print(f"  {claim}: {middle:.2f} [{low:.2f}, {high:.2f}]")


def plot(found: Found, title: str, path: Path) -> None:
    """Bars of the medians, a dot for each sample: saves and cold loads by wall, warm by CPU."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = (
        (SAVE, "wall_s", "save, durable: wall seconds"),
        (WARM, "cpu_s", "load, in the page cache: CPU seconds of all ranks"),
        (COLD, "wall_s", "load, not in the page cache: wall seconds"),
    )
    figure, places = pyplot.subplots(1, 3, figsize=(19, 10), layout="constrained")
    for place, (kind, unit, label) in zip(places, panels, strict=True):
        labels: list[str] = []
        for layout in LAYOUTS:
            turns = [t for t in found if t.kind == kind and t.layout == layout]
            for turn in turns:
                values = getattr(found[turn], unit)
                y = len(labels)
                place.barh(y, statistics.median(values), color=_colour(turn.way), height=0.8)
                place.plot(values, [y] * len(values), "k.", markersize=3)
                labels.append(f"{layout}: {turn.label}")
            if turns:
                labels.append("")
        place.set_yticks(range(len(labels)), labels, fontsize=8)
        place.grid(axis="x", alpha=0.3)
        place.invert_yaxis()
        place.set_title(label, fontsize=10)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _colour(way: str) -> str:
    if way in (RAW, MEMCPY, STRIDED):
        return "0.6"
    if way in (OURS, UNCHECKED):
        return "tab:green"
    return "tab:red" if way in (DCP, DCP_THREADS, DCP_SAFETENSORS) else "tab:blue"
