"""Options of a launch."""

from __future__ import annotations

from dataclasses import dataclass

CHOICES = {
    "cp_async": ("strict", "late", "early"),
    "stats": (True, "full"),
    "wgmma_registers": ("note", "strict"),
}


@dataclass(frozen=True)
class Options:
    """Options of `Module.launch`; the README tells what they do."""

    cp_async: str = "strict"
    check_races: bool = False
    check_uninit: bool = False
    check_overlap: bool = False
    check_limits: bool = True
    wgmma_registers: str = "note"
    schedule_seed: int | None = None
    stats: bool | str = True
    max_lanes: int = 4096
    max_steps: int = 20_000_000
    time_limit: float | None = None
    shared_fill: int = 0xFF

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                listed = ", ".join(map(repr, choices))
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {listed}")

    def key(self) -> tuple:
        """What a bound program depends on."""
        return (
            self.cp_async,
            self.check_races,
            self.check_uninit,
            self.check_overlap,
            self.wgmma_registers,
            self.stats,
            self.shared_fill,
        )
