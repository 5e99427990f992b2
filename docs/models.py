"""Writes docs/models.md: what "all-linear" adapts of each architecture, and what it leaves out.

    python -m docs.models

Shares are those of the default configuration, whose model is built without weights. Which layers a
model passes by, and what peft adapts, is found on a tiny random model of the same class.
"""

import copy
import re
import warnings
from pathlib import Path

import peft
import torch
import transformers as hf

from lorasb_kernels.init.estimation.usage import unusable_layers
from lorasb_kernels.targets import Coverage, coverage_of, select_layers
from tests.families.names import FAMILIES
from tests.families.tiny import build

RANK = 16
HEAD = f"""# Models

What `target_modules="all-linear"` adapts at r = {RANK}, in the classes of transformers
{hf.__version__} that the tests adapt, train, merge, save and load as tiny random models.
`python -m docs.models` writes this page. Shares are of the matrix weights of the default
configuration: linear layers, and other parameters of two or three dimensions such as experts; no
embeddings, convolutions, biases or heads. The last column is what peft {peft.__version__} adapts of
them under "all-linear", "refused" where it raises an error. What is less than 0.05 % is not listed.

How layers are found on which an adapter would have no effect is in
[choosing](choosing.md#targets).

| model | adapted | not adapted | peft |
|---|---|---|---|
"""


def pattern(name: str) -> str:
    """A module's name, for every layer of that name."""
    return re.sub(r"\d+", "#", name)


def peft_layers(model: torch.nn.Module) -> set[str] | None:
    """Patterns of the layers that peft adapts; None if it raises."""
    try:
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules="all-linear"))
    except Exception:  # whatever keeps peft from it
        return None
    return {
        pattern(name.removeprefix("base_model.model."))
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def coverage(name: str) -> tuple[Coverage, str]:
    """Ours, and the shares that peft adapts, with and without effect."""
    tiny = build(name)
    unusable = {
        pattern(layer): reason
        for layer, reason in unusable_layers(tiny, select_layers(tiny, "all-linear").layers).items()
    }
    theirs = peft_layers(copy.deepcopy(tiny))
    kind = getattr(hf, name)
    with torch.device("meta"):
        model = kind._from_config(kind.config_class())
    selection = select_layers(model, "all-linear", r=RANK)
    reasons = dict(selection.skipped)
    reasons |= {n: unusable[p] for n in selection.layers if (p := pattern(n)) in unusable}
    ours = coverage_of(model, [n for n in selection.layers if n not in reasons], reasons)
    if theirs is None:
        return ours, "refused"
    names = [n for n, _ in model.named_modules() if pattern(n) in theirs]
    adapted = coverage_of(model, names, {}).share
    idle = coverage_of(model, [n for n in names if pattern(n) in unusable], {}).share
    return ours, f"{adapted:.1%}" + (f", of them {idle:.1%} without effect" if idle else "")


def row(name: str) -> str:
    """A row of the table."""
    ours, theirs = coverage(name)
    left_out = [
        f"{group.weights / ours.total:.1%} {group.kind}: {group.reason}"
        for group in ours.skipped
        if group.weights / ours.total >= 0.0005
    ]
    return f"| {name} | {ours.share:.1%} | {'; '.join(left_out)} | {theirs} |"


if __name__ == "__main__":
    hf.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    rows = [row(name) for name in sorted(FAMILIES)]
    Path(__file__).with_name("models.md").write_text(HEAD + "\n".join(rows) + "\n", "utf-8")
