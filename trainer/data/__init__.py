"""Tokens and batches: a deterministic stream over text and tokens anywhere, without torch."""

from everstep.trainer.data.corpus import (
    Corpus,
    CorpusPart,
    check_held_out_fits,
    check_training_fits,
    open_corpus,
    samples_in,
    vocab_size_of,
)
from everstep.trainer.data.stream import (
    MicroBatch,
    SampleStream,
    TrainStream,
    held_out_batches,
)
from everstep.trainer.data.tokenizer import Tokenizer, open_tokenizer

__all__ = [
    "Corpus",
    "CorpusPart",
    "MicroBatch",
    "SampleStream",
    "Tokenizer",
    "TrainStream",
    "check_held_out_fits",
    "check_training_fits",
    "held_out_batches",
    "open_corpus",
    "open_tokenizer",
    "samples_in",
    "vocab_size_of",
]
