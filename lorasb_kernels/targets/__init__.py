"""Which layers of a model are adapted, which are not, and why."""

from lorasb_kernels.targets.adapted import adapted_layers, config_of, layers_of, refuse_adapted
from lorasb_kernels.targets.coverage import Coverage, CoverageWarning, Skipped, coverage_of
from lorasb_kernels.targets.heads import head_modules
from lorasb_kernels.targets.names import find_saved_modules, matches_suffix
from lorasb_kernels.targets.obstacles import computes_linear, obstacles
from lorasb_kernels.targets.select import (
    ALL_LINEAR,
    Selection,
    find_layers,
    find_targets,
    refuse_meta,
    select_layers,
)

__all__ = [
    "ALL_LINEAR",
    "Coverage",
    "CoverageWarning",
    "Selection",
    "Skipped",
    "adapted_layers",
    "computes_linear",
    "config_of",
    "coverage_of",
    "find_layers",
    "find_saved_modules",
    "find_targets",
    "head_modules",
    "layers_of",
    "matches_suffix",
    "obstacles",
    "refuse_adapted",
    "refuse_meta",
    "select_layers",
]
