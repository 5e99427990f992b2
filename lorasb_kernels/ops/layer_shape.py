"""The sizes that decide how a layer runs."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """A layer [m, n] at rank r on M tokens; `dropout` applies to the input gradient.

    Raises:
        ValueError: naming the size, what it is and what was expected.
    """

    M: int
    m: int
    n: int
    r: int
    dropout: float = 0.0

    def __post_init__(self):
        sizes = {"tokens": self.M, "out_features": self.m, "in_features": self.n, "r": self.r}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}; expected at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; expected 0 <= dropout < 1")


__all__ = ["LayerShape"]
