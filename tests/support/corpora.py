"""Small corpora for tests: text on disk, tokens that say where they are, a real tokenizer.json."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from everstep.trainer.config import DataConfig
from everstep.trainer.data import Corpus, CorpusPart
from everstep.trainer.data.tokenizer import BytesTokenizer

WORDS = ["snow", "step", "rank", "shard", "grün", "東京", "loss\tand", "of the", "in\n\nevery"]


def counting_corpus(tokens: int, held_out: int = 0) -> Corpus:
    """A corpus whose tokens are 0, 1, 2, ...: what is in a batch tells where it was cut."""
    row = np.arange(tokens + held_out, dtype=np.uint32)
    part = CorpusPart(
        name="counting",
        tokens_train=row[:tokens],
        tokens_held_out=row[tokens:],
        digest=f"counting {tokens} {held_out}",
        text_digest="text",
        documents=1,
        text_bytes=tokens,
    )
    return Corpus(parts=(part,), tokenizer_digest="tokenizer", tokenizer=BytesTokenizer())


def data_config(source: str | list[str] | Path = "unused", **fields: Any) -> DataConfig:
    """A configuration that a corpus of a few hundred bytes satisfies."""
    small = {"seq_len": 8, "global_batch": 4, "held_out": 0.1}
    return DataConfig(source=str(source) if isinstance(source, Path) else source, **small | fields)


def write_texts(folder: Path, count: int = 12, seed: int = 0, size_bytes: int = 400) -> Path:
    """``count`` UTF-8 files of differing lengths around ``size_bytes``."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for number in range(count):
        words = rng.choices(WORDS, k=math.ceil(size_bytes * rng.uniform(0.5, 1.5) / 6))
        (folder / f"{number:03d}.txt").write_text(" ".join(words), encoding="utf-8")
    return folder


def write_tokenizer(
    path: Path, special_tokens: tuple[str, ...] = ("<|endoftext|>",), vocab_size: int = 300
) -> Path:
    """A byte-level BPE ``tokenizer.json``, trained on the spot; needs the tokenizers package."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS) * 20], trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return path


def edited(path: Path, edit: Callable[[bytes], bytes]) -> None:
    """Rewrites a file with ``edit`` of its contents."""
    path.write_bytes(edit(path.read_bytes()))
