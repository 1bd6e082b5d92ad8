"""Batches as a pure function of the global sample index, whatever the number of ranks.

Sample ``s`` of a run belongs to epoch ``s // samples_per_epoch``; which part of the text it is, a
keyed permutation of that epoch says. In a mixture, ``mixture.Mixture`` first says which source a
sample is of, and which of that source's samples; each source has epochs of its own. A global batch
is ``global_batch`` consecutive samples, and every rank takes its block of them. So the only state
is how many samples have been consumed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from everstep.trainer.config import DataConfig
from everstep.trainer.data.corpus import (
    Corpus,
    CorpusPart,
    check_held_out_fits,
    check_training_fits,
    samples_in,
)
from everstep.trainer.data.mixture import Mixture, seed_of_source
from everstep.trainer.data.permutation import permute
from everstep.trainer.data.token_row import Tokens
from everstep.trainer.errors import DataError
from everstep.trainer.mesh_shape import plan_batches

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MicroBatch:
    """What one rank feeds to one forward pass."""

    tokens_BL: Int64s
    targets_BL: Int64s
    """The token that follows each of ``tokens_BL``."""
    sample_B: Int64s
    """Global sample indices, counted over the whole run: they key whatever is random per sample."""


class SampleStream:
    """The samples of a row of tokens, epoch after epoch, each epoch in an order of its own.

    Samples start at multiples of ``seq_len``; what is left at the end is not used. A sample is
    ``seq_len`` + 1 tokens long, its last token being the first of the next one.
    """

    def __init__(self, tokens: Tokens, seq_len: int, seed: int) -> None:
        self.samples_per_epoch = samples_in(tokens.size, seq_len)
        if not self.samples_per_epoch:
            raise DataError(
                f"{tokens.size:,} tokens make no sample of data.seq_len={seq_len:,} and the token "
                "after it; add text or lower data.seq_len"
            )
        self._tokens = tokens
        self._seq_len = seq_len
        self._seed = seed

    def epoch(self, sample_index: int) -> int:
        """The epoch that a global sample index belongs to, from 0."""
        return sample_index // self.samples_per_epoch

    def window(self, sample_index: int) -> int:
        """Which run of ``seq_len`` tokens, counted from the start of the text, the sample is."""
        return int(self.windows(np.array([sample_index]))[0])

    def windows(self, sample_indices: Int64s) -> Int64s:
        """``window`` of (B,) global sample indices, which may lie in several epochs."""
        epochs, positions = np.divmod(sample_indices, self.samples_per_epoch)
        return permute(positions, epochs, self.samples_per_epoch, self._seed)

    def batch(self, sample_indices: Int64s) -> Int64s:
        """(B, seq_len + 1) tokens of (B,) global sample indices."""
        return cut_windows(self._tokens, self.windows(sample_indices), self._seq_len)


class MixedSamples:
    """The samples of several parts of a corpus, in proportion to their weights."""

    def __init__(self, parts: Sequence[CorpusPart], seq_len: int, seed: int) -> None:
        self._mixture = Mixture([part.weight for part in parts], seed)
        self._seq_len = seq_len
        self._streams = [
            SampleStream(part.tokens_train, seq_len, seed_of_source(seed, number))
            for number, part in enumerate(parts)
        ]
        self.samples_per_epoch = sum(stream.samples_per_epoch for stream in self._streams)
        """Samples of all parts: parts go round at paces of their own, this often on average."""

    def batch(self, sample_indices: Int64s) -> Int64s:
        """(B, seq_len + 1) tokens of (B,) global sample indices."""
        result = np.empty((sample_indices.size, self._seq_len + 1), dtype=np.int64)
        sources, indices = self._mixture.choose(sample_indices)
        for number, stream in enumerate(self._streams):
            rows = np.flatnonzero(sources == number)
            if rows.size:
                result[rows] = stream.batch(indices[rows])
        return result


def cut_windows(tokens: Tokens, windows: Int64s, seq_len: int) -> Int64s:
    """(B, seq_len + 1): ``tokens`` from ``windows[b] * seq_len`` on."""
    result = np.empty((windows.size, seq_len + 1), dtype=np.int64)
    for row, window in zip(result, windows.tolist(), strict=True):
        row[:] = tokens[window * seq_len : (window + 1) * seq_len + 1]
    return result


class TrainStream:
    """The training batches of one data-parallel rank, without end.

    Args:
        corpus: The same on every rank.
        data: Section ``data`` of the run.
        seed: Of the run; decides the order.
        dp_rank: This rank among ``dp_size`` data-parallel ranks; tensor-parallel ranks share one.

    Raises:
        DataError: the corpus is too small.
        ConfigError: the global batch does not divide among the ranks and micro batches.
    """

    def __init__(
        self, corpus: Corpus, data: DataConfig, seed: int, dp_rank: int, dp_size: int
    ) -> None:
        check_training_fits(corpus, data)
        self._share = _Share(data, dp_rank, dp_size)
        self._samples = (
            SampleStream(corpus.tokens_train, data.seq_len, seed)
            if len(corpus.parts) == 1
            else MixedSamples(corpus.parts, data.seq_len, seed)
        )
        self._global_batch = data.global_batch
        self._origin: dict[str, Any] = {
            "seed": seed,
            "seq_len": data.seq_len,
            "digest": corpus.digest,
            "text": corpus.name,
            "text_digest": corpus.text_digest,
            "tokenizer": data.tokenizer,
            "tokenizer_digest": corpus.tokenizer_digest,
            "held_out": data.held_out,
        }
        if len(corpus.parts) > 1:
            self._origin["sources"] = [
                {
                    "name": p.name,
                    "weight": p.weight,
                    "digest": p.digest,
                    "text_digest": p.text_digest,
                }
                for p in corpus.parts
            ]
        self.position = 0
        """Global samples consumed: the batches handed out count, those in preparation do not."""

    @property
    def samples_per_epoch(self) -> int:
        """Global samples after which the text begins again in another order.

        In a mixture: after which the parts have done so once on average.
        """
        return self._samples.samples_per_epoch

    @property
    def epoch(self) -> int:
        """The epoch of the next sample, from 0."""
        return self.position // self.samples_per_epoch

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        return self.next_step()

    def next_step(self) -> list[MicroBatch]:
        """This rank's micro batches of the next global batch; advances by that global batch."""
        batches = self.step_at(self.position)
        self.position += self._global_batch
        return batches

    def step_at(self, position: int) -> list[MicroBatch]:
        """This rank's micro batches of the global batch that begins with sample ``position``.

        A pure function of the position: any thread may call it, in any order.
        """
        return [
            _micro_batch(self._samples.batch(indices), indices)
            for indices in self._share.of(position)
        ]

    def state_dict(self) -> dict[str, Any]:
        """JSON-able position, and what it is a position in."""
        return {"position": self.position, "epoch": self.epoch, **self._origin}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved position; global batch, micro batch and number of ranks may differ.

        Raises:
            DataError: the position is one in other text, or in another order; nothing is changed.
        """
        position = state.get("position")
        if type(position) is not int or position < 0:
            raise DataError(
                f"the saved data position is {position!r}, not a number of samples: the checkpoint "
                "was not written by this trainer; resume from another one or start a new run"
            )
        difference = explain_difference(state, self._origin)
        if difference is not None:
            raise DataError(difference)
        self.position = position


def explain_difference(saved: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """Why a position in ``saved`` means nothing ``here``, and the way out; None if it does."""
    for key in ("seed", "seq_len"):
        if saved.get(key) != here[key]:
            name = "seed" if key == "seed" else f"data.{key}"
            return (
                f"the checkpoint was written with {name}={saved.get(key)}, and this run has "
                f"{name}={here[key]}, so the data would not go on where it stopped; set {name} "
                "back, or train in a new run directory"
            )
    if saved.get("digest") == here["digest"]:
        return None
    if (mixing := _explain_mixture(saved.get("sources"), here.get("sources"))) is not None:
        return mixing
    if saved.get("text_digest") != here["text_digest"]:
        what = (
            f"the text is not the one that this run began with: {saved.get('text')} then (digest "
            f"{_short(saved.get('text_digest'))}), {here['text']} now (digest "
            f"{_short(here['text_digest'])})"
        )
        out = "restore the original text (the standard library differs between Python versions)"
    elif saved.get("tokenizer_digest") != here["tokenizer_digest"]:
        what = (
            "the tokenizer is not the one that this run began with: data.tokenizer="
            f"{saved.get('tokenizer')} then (digest {_short(saved.get('tokenizer_digest'))}), "
            f"{here['tokenizer']} now (digest {_short(here['tokenizer_digest'])})"
        )
        out = "restore the original tokenizer"
    elif saved.get("held_out") != here["held_out"]:
        what = (
            f"this run began with data.held_out={saved.get('held_out')} and has "
            f"{here['held_out']} now, so text would move between training and evaluation"
        )
        out = f"set data.held_out={saved.get('held_out')}"
    else:
        what = (
            "the same text and tokenizer.json give other tokens than when this run began (digest "
            f"{_short(saved.get('digest'))} then, {_short(here['digest'])} now): another version "
            "of the tokenizers package"
        )
        out = "install the original version"
    return f"{what}; {out}, or train in a new run directory"


def _explain_mixture(saved: Any, here: Any) -> str | None:
    """How one list of sources differs from another; None if neither is a mixture, or they agree."""
    saved, here = saved or [], here or []
    if len(saved) != len(here):
        return (
            f"this run began with {_sources(saved)} in data.source and has {_sources(here)} now, "
            "so the data would not go on where it stopped; restore the list, or train in a "
            "new run directory"
        )
    for number, (before, now) in enumerate(zip(saved, here, strict=True)):
        name = f"data.source[{number}] ({now['name']})"
        if before["text_digest"] != now["text_digest"]:
            return (
                f"{name} is not the source that this run began with: {before['name']} then (digest "
                f"{_short(before['text_digest'])}), {now['name']} now (digest "
                f"{_short(now['text_digest'])}); restore the original data and order of the list, "
                "or train in a new run directory"
            )
    weights = [source["weight"] for source in saved], [source["weight"] for source in here]
    if weights[0] != weights[1]:
        return (
            f"the weights of data.source were {_numbers(weights[0])} when this run began and are "
            f"{_numbers(weights[1])} now, so the data would not go on where it stopped; set them "
            "back, or train in a new run directory"
        )
    return None


def _sources(sources: Sequence[Any]) -> str:
    return f"a mixture of {len(sources)} sources" if sources else "one source"


def _numbers(values: Sequence[Any]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def held_out_batches(
    corpus: Corpus, data: DataConfig, n_batches: int, dp_rank: int, dp_size: int
) -> Iterator[MicroBatch]:
    """This rank's micro batches of the evaluation: the same samples each time, on any layout.

    ``n_batches`` global batches are spread evenly over the held-out tokens, fewer if those do not
    make as many. If they do not even make one, its samples repeat, so that every rank has work.
    The parts of a mixture have as many samples in it as their weights say.

    Raises:
        DataError: at the call, if nothing is held out, or less than one sample.
    """
    check_held_out_fits(corpus, data)
    own = _Share(data, dp_rank, dp_size)
    mixture = Mixture([part.weight for part in corpus.parts], 0)
    available = [samples_in(part.tokens_held_out.size, data.seq_len) for part in corpus.parts]
    enough = min(
        int(samples / share) for samples, share in zip(available, mixture.shares, strict=True)
    )
    n_batches = min(n_batches, max(1, enough // data.global_batch))
    total = n_batches * data.global_batch
    ends = np.cumsum(mixture.quotas(total))

    def batches() -> Iterator[MicroBatch]:
        for start in range(0, total, data.global_batch):
            for indices in own.of(start):
                tokens = _held_out_rows(corpus, data.seq_len, indices, ends, available)
                yield _micro_batch(tokens, indices)

    return batches()


def _held_out_rows(
    corpus: Corpus, seq_len: int, indices_B: Int64s, ends_S: Int64s, available: Sequence[int]
) -> Int64s:
    """(B, seq_len + 1) tokens; the samples before ``ends_S[s]`` are of part s or before."""
    result = np.empty((indices_B.size, seq_len + 1), dtype=np.int64)
    parts_B = np.searchsorted(ends_S, indices_B, side="right")
    for number, part in enumerate(corpus.parts):
        rows = np.flatnonzero(parts_B == number)
        if rows.size:
            first, after = (int(ends_S[number - 1]) if number else 0), int(ends_S[number])
            windows = (indices_B[rows] - first) * available[number] // (after - first)
            result[rows] = cut_windows(part.tokens_held_out, windows, seq_len)
    return result


class _Share:
    """Which samples of a global batch one rank takes, and in which micro batches."""

    def __init__(self, data: DataConfig, dp_rank: int, dp_size: int) -> None:
        if not 0 <= dp_rank < dp_size:
            raise DataError(
                f"there is no data-parallel rank {dp_rank} among {dp_size}: they count from 0 to "
                f"{dp_size - 1}"
            )
        self._plan = plan_batches(data, dp_size)
        self._first = dp_rank * self._plan.per_rank

    def of(self, position: int) -> Iterator[Int64s]:
        """Global sample indices of each micro batch of the global batch at ``position``."""
        first = position + self._first
        for start in range(first, first + self._plan.per_rank, self._plan.micro_batch):
            yield np.arange(start, start + self._plan.micro_batch)


def _micro_batch(tokens: Int64s, sample_B: Int64s) -> MicroBatch:
    """Parts a (B, L + 1) array into inputs and targets, both contiguous."""
    return MicroBatch(
        np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:]), sample_B
    )


def _short(digest: Any) -> str:
    return str(digest)[:12]
