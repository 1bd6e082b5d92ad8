"""How fast to copy and to flush, so that training is disturbed least (pure; no clock).

A copy in the background takes bandwidth from what computes. It costs least when it is spread over
all the time that there is: from the begin of a capture to the fence before the next update (the
*window*). What is not copied by then, the caller copies at the fence, which training waits for.

**Copies.** With B the bytes of a snapshot, W the shortest of the last windows and a share of it
that is planned for, the copy needs B / (share * W) bytes/s. A copier that is told a rate reaches
some part e of it (it sleeps, it is not scheduled, memory is busy)::

    rate = B / (share * W * e)

W is the *shortest* of the last few: one long window (an evaluation, a compilation) changes nothing,
a training that becomes faster counts from the next step on, one that becomes slower after a few.
S, what is reached at full speed, is measured when the copier runs at it, as it does at first. Of e
and S, less than before counts at once, more by and by.

Where the rate comes near S, a limit is of no use, and none is set (``None``). It returns when the
rate is well below S, but not before some steps have passed, and after more of them each time that
it did not last: a copier that cannot keep limits is not asked to again and again. Small changes of
a rate are not made. So the rate settles instead of following noise.

**Flushes.** With L bytes left, D seconds until the next flush is due, and I seconds between two::

    rate = L / (D - (1 - share) * I)

which is B / (share * I) when a flush begins, and stays that while the storage keeps up. When it
does not, the rate rises, up to no limit when that time is over.
"""

from dataclasses import dataclass, replace

_FULL_FROM = 0.95
"""A limit that is so near to full speed is none."""
_FULL_UNTIL = 0.75
"""Full speed ends when a limit is so far below it."""
_STILL = 0.08
"""Relative changes of a rate that are not made."""
_LEAST_REACHED = 0.1
_MOST_FALL = 0.5
"""How far a single capture may pull down what copies are taken to reach of a limit."""
_PATIENCE_STEPS = 64
_MOST_PATIENCE_STEPS = 4096
"""For how many captures there is no limit after one that was of no use: at first, and at most."""


@dataclass(frozen=True, kw_only=True)
class PacingSettings:
    """What is wanted."""

    paced_copy: bool = True
    """False: copies are never limited. On a CPU whose cores all compute, a thread of the lowest
    priority and help at the fence disturb less than a thread that keeps a rate."""
    capture_share: float = 0.8
    """Of the window, for a capture; the rest is the margin."""
    flush_share: float = 0.5
    """Of the time between two flushes, for one."""
    windows: int = 4
    """How many of the last windows count."""


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """What was measured between two fences."""

    window_s: float
    """From the begin of the capture to the fence, without what the fence had to wait."""
    snapshot_bytes: int = 0
    """To be captured; 0: this step was not captured."""
    background_bytes: int = 0
    """Of these, what was copied when the fence was reached."""
    background_s: float = 0.0
    """How long that took: until it was complete, or until the fence."""


@dataclass(frozen=True, kw_only=True)
class Pacing:
    """What is known, and what follows from it; a step makes a new one with ``after_step``."""

    settings: PacingSettings = PacingSettings()
    copy_bytes_per_s: float | None = None
    """For the next capture; None: full speed."""
    windows_s: tuple[float, ...] = ()
    """The last ones, the newest last."""
    reached: float = 1.0
    """The part of a limit that copies reach."""
    full_bytes_per_s: float | None = None
    """What copies reach without a limit; None: not seen yet."""
    captures: int = 0
    """How many there were since the limit came, or went."""
    patience: int = 0
    """So many are to go by without a limit before there is one again."""


def after_step(pacing: Pacing, facts: StepFacts) -> Pacing:
    """What the next capture is to do, after a step."""
    windows = (*pacing.windows_s, facts.window_s)[-pacing.settings.windows :]
    pacing = _measured(replace(pacing, windows_s=windows), facts)
    if not pacing.settings.paced_copy or not facts.snapshot_bytes:
        return pacing
    return _limited(pacing, facts.snapshot_bytes)


def flush_rate(
    left_bytes: int, due_s: float, interval_s: float, settings: PacingSettings
) -> float | None:
    """Bytes/s at which a flush is to go on; None: as fast as it goes.

    Args:
        left_bytes: not written yet; of a flush that begins, all.
        due_s: until the next flush is to begin.
        interval_s: between the begins of two flushes; of a flush that begins, ``due_s``.
        settings: what is wanted.
    """
    time_s = due_s - (1.0 - settings.flush_share) * interval_s
    return left_bytes / time_s if left_bytes > 0 and time_s > 0 else None


def _measured(pacing: Pacing, facts: StepFacts) -> Pacing:
    """With the speed of the last capture, as far as it tells one."""
    if not facts.snapshot_bytes or facts.background_s <= 0:
        return pacing
    speed = facts.background_bytes / facts.background_s
    if pacing.copy_bytes_per_s is not None:
        least = max(_LEAST_REACHED, _MOST_FALL * pacing.reached)
        part = min(1.0, max(least, speed / pacing.copy_bytes_per_s))
        return replace(pacing, reached=_cautious(pacing.reached, part))
    before = pacing.full_bytes_per_s
    seen = speed if before is None else _cautious(before, speed)
    return replace(pacing, full_bytes_per_s=seen)


def _cautious(before: float, now: float) -> float:
    """A measured speed: a fall counts at once, so that it is not overrated; a rise by and by."""
    return now if now < before else (3 * before + now) / 4


def _limited(pacing: Pacing, snapshot_bytes: int) -> Pacing:
    """With the rate that follows from what is known."""
    pacing = replace(pacing, captures=pacing.captures + 1)
    window_s, full = min(pacing.windows_s), pacing.full_bytes_per_s
    before = pacing.copy_bytes_per_s
    if full is None or window_s <= 0:
        return pacing
    rate = snapshot_bytes / (pacing.settings.capture_share * window_s * pacing.reached)
    if before is None:
        if pacing.captures < pacing.patience or rate >= _FULL_UNTIL * full:
            return pacing
        return replace(pacing, copy_bytes_per_s=rate, captures=0)
    if rate >= _FULL_FROM * full:
        lasted = pacing.captures >= pacing.patience
        patience = _PATIENCE_STEPS if lasted else min(_MOST_PATIENCE_STEPS, 2 * pacing.patience)
        return replace(pacing, copy_bytes_per_s=None, reached=1.0, captures=0, patience=patience)
    if abs(rate - before) <= _STILL * before:
        return pacing
    return replace(pacing, copy_bytes_per_s=rate)
