"""The part of the built-in model that one pipeline stage computes."""

from collections.abc import Sequence

from torch import Tensor, nn

from everstep.trainer.model import Llama, run_blocks
from everstep.trainer.pipeline_plan import StageSpan


class Stage(nn.Module):
    """Consecutive parts of a model, as ``span`` says; the model still holds and names them."""

    def __init__(self, model: Llama, span: StageSpan) -> None:
        super().__init__()
        self.span = span
        self.tied_head = span.last and model.config.tie_embeddings
        decoder = model.model
        if span.first or self.tied_head:
            self.embed_tokens = decoder.embed_tokens
        numbers = {str(number) for number in span.layers}
        self.layers = nn.ModuleDict(
            {
                number: block
                for number, block in decoder.layers.named_children()
                if number in numbers
            }
        )
        if span.last:
            self.norm = decoder.norm
            self.lm_head = model.lm_head
        self.context = decoder.context

    def forward(self, x: Tensor, tokens_BL: Tensor, sample_B: Tensor | None = None) -> Tensor:
        """The stream (B, L, D) of the stage before -> that of the next stage.

        The first stage takes ``tokens_BL`` as ``x``; the last one returns logits, as ``Llama``.
        """
        context = self.context(tokens_BL, sample_B)
        x_BLD = self.embed_tokens(x) if self.span.first else x
        x_BLD = run_blocks(x_BLD, self.layers.items(), *context)
        if not self.span.last:
            return x_BLD
        logits_BLV: Tensor = self.lm_head(self.norm(x_BLD))
        return logits_BLV


def split_model(model: Llama, spans: Sequence[StageSpan]) -> None:
    """Make ``model.stages`` of this rank's ``spans`` and drop everything that they do not need.

    What is left keeps its names, so that weights and checkpoints do not depend on the pipeline;
    from now on it is the stages that compute. A tied head keeps the embedding, whose parameter and
    name it shares.
    """
    model.stages = [Stage(model, span) for span in spans]
    kept = {module for stage in model.stages for module in stage.modules()}
    containers = (model, model.model, model.model.layers)
    for container in containers:
        for name, child in list(container.named_children()):
            if child not in kept and child not in containers:
                delattr(container, name)
