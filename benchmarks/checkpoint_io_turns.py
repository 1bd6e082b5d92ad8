"""What the checkpoint benchmark measures, and in which order (pure; no torch)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

RANKS = 4
ROWS, BOXES, TP, ONE = "4 row shards", "2x2 boxes", "tp2 x dp2", "1 rank"
LAYOUTS = (ROWS, BOXES, TP, ONE)

RAW, MEMCPY, STRIDED = "raw O_DIRECT", "raw memcpy", "raw strided copy"
OURS, UNCHECKED = "everstep", "everstep, unchecked"
DCP, DCP_THREADS, DCP_SAFETENSORS = "DCP", "DCP, 2 threads", "DCP, safetensors"
TORCH, SAFETENSORS, TENSORSTORE = "torch.save", "safetensors", "TensorStore zarr3"

SAVE, WARM, COLD = "save", "load warm", "load cold"


@dataclass(frozen=True, kw_only=True)
class Size:
    """A Llama's widths; all divisible by four, so that every peer can save and load it."""

    dim: int
    ffn_dim: int
    layers: int
    vocab: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor by name."""
        d, f = self.dim, self.ffn_dim
        layer: dict[str, tuple[int, ...]] = {
            "attn_norm": (d,), "q": (d, d), "k": (d, d), "v": (d, d), "o": (d, d),
            "ffn_norm": (d,), "gate": (f, d), "up": (f, d), "down": (d, f),
        }  # fmt: skip
        shapes = {f"layer{i}_{n}": s for i in range(self.layers) for n, s in layer.items()}
        return {"embed": (self.vocab, d), **shapes, "norm": (d,), "head": (self.vocab, d)}

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors, float32."""
        return 4 * sum(math.prod(shape) for shape in self.shapes().values())


FULL = Size(dim=1024, ffn_dim=2816, layers=33, vocab=32000)
QUICK = Size(dim=384, ffn_dim=1024, layers=33, vocab=12288)
TINY = Size(dim=16, ffn_dim=32, layers=2, vocab=64)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One thing that is measured once per round."""

    kind: str
    """SAVE, WARM or COLD."""
    way: str
    source: str
    """The layout that the files were saved from; of a save, the layout it saves."""
    layout: str
    """The layout that is saved or loaded."""

    @property
    def group(self) -> str:
        """Turns of a group do the same work."""
        return f"{self.kind}, {self.layout}"

    @property
    def label(self) -> str:
        """The way; for a load of what one rank has saved, that too."""
        of_one = self.kind != SAVE and self.source == ONE and self.way not in (RAW, MEMCPY, STRIDED)
        return f"{self.way}, saved by 1 rank" if of_one else self.way


def all_turns() -> list[Turn]:
    """Every turn of a round; saves come first, so that the files are there in the first round."""
    return [
        *(
            Turn(kind=SAVE, way=way, source=layout, layout=layout)
            for layout, ways in (
                (ROWS, (RAW, OURS, DCP, DCP_THREADS, DCP_SAFETENSORS)),
                (ONE, (RAW, OURS, DCP, DCP_THREADS, TORCH, SAFETENSORS, TENSORSTORE)),
            )
            for way in ways
        ),
        *(_load(WARM, MEMCPY, layout, layout) for layout in (ROWS, ONE)),
        *(_load(WARM, STRIDED, ROWS, layout) for layout in (BOXES, TP)),
        *(_load(WARM, UNCHECKED, ROWS, layout) for layout in LAYOUTS),
        *(_load(COLD, RAW, layout, layout) for layout in (ROWS, ONE)),
        *(
            _load(kind, way, ROWS, layout)
            for kind in (WARM, COLD)
            for layout in LAYOUTS
            for way in (OURS, DCP, DCP_SAFETENSORS)
        ),
        *(
            _load(kind, way, ONE, layout)
            for kind in (WARM, COLD)
            for layout, ways in (
                (ROWS, (TENSORSTORE,)),
                (BOXES, (TENSORSTORE,)),
                (TP, (TENSORSTORE,)),
                (ONE, (OURS, TORCH, SAFETENSORS, TENSORSTORE)),
            )
            for way in ways
        ),
    ]


def _load(kind: str, way: str, source: str, layout: str) -> Turn:
    return Turn(kind=kind, way=way, source=source, layout=layout)


def in_round(turns: Sequence[Turn], number: int, rounds: int) -> list[Turn]:
    """The order of a round: rounds begin evenly spread over the list, every second goes back."""
    begin = number * len(turns) // max(rounds, 1) % max(len(turns), 1)
    rotated = [*turns[begin:], *turns[:begin]]
    return rotated if number % 2 == 0 else rotated[::-1]
