"""The linear layers of the models the papers train, by block."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """One linear layer: n inputs, m outputs."""

    name: str
    n: int
    m: int


@dataclass(frozen=True)
class Preset:
    """A model, reduced to its linear layers.

    Args:
        key: name on the command line.
        groups: layers of one block, those that read the same input together.
        blocks: number of blocks.
        vocabulary: outputs of the head.
        bias: whether the layers have one.
        tied: whether the head's weight is that of the embedding.
    """

    key: str
    groups: tuple[tuple[Layer, ...], ...]
    blocks: int
    vocabulary: int
    bias: bool = False
    tied: bool = False

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of one block."""
        return tuple(layer for group in self.groups for layer in group)


def gated(hidden: int, intermediate: int, query: int, key_value: int):
    """The seven layers of a Llama-like block."""
    return (
        (
            Layer("q_proj", hidden, query),
            Layer("k_proj", hidden, key_value),
            Layer("v_proj", hidden, key_value),
        ),
        (Layer("o_proj", query, hidden),),
        (Layer("gate_proj", hidden, intermediate), Layer("up_proj", hidden, intermediate)),
        (Layer("down_proj", intermediate, hidden),),
    )


def encoder(hidden: int, intermediate: int):
    """The six layers of a BERT-like block."""
    return (
        tuple(Layer(name, hidden, hidden) for name in ("query", "key", "value")),
        (Layer("attention.output", hidden, hidden),),
        (Layer("intermediate", hidden, intermediate),),
        (Layer("output", intermediate, hidden),),
    )


PRESETS = {
    preset.key: preset
    for preset in (
        Preset("llama-3.2-3b", gated(3072, 8192, 3072, 1024), 28, 128256, tied=True),
        Preset("mistral-7b", gated(4096, 14336, 4096, 1024), 32, 32000),
        Preset("gemma-2-9b", gated(3584, 14336, 4096, 2048), 42, 256000, tied=True),
        Preset("roberta-large", encoder(1024, 4096), 24, 50265, bias=True, tied=True),
    )
}
# The names of layers that read the same input, in the families of models that are adapted.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))
TINY = Preset("tiny", gated(48, 80, 48, 16), 2, 128)  # to test the code on any machine

__all__ = ["PRESETS", "SIBLINGS", "TINY", "Layer", "Preset"]
