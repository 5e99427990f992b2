"""The model card of an adapter: `README.md` beside it, as the Hugging Face hub shows it."""

import re
from pathlib import Path

from lorasb_kernels.io.record import Record
from lorasb_kernels.utils.files import write_text

CARD_FILE = "README.md"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

_CARD = """---
{base_line}library_name: lorasb_kernels
tags:
- {method}
---

# {method} adapter of {base}

`s·B·R·A` beside {layers} frozen linear layers, r = {r}, s = {s:g}, made with lorasb_kernels.

| | |
|---|---|
| base model | {base} |
| method | {method} |
| target modules | {targets} |
| dropout in training | {dropout:g} |
| modules trained whole | {saved} |

## Load

```python
from lorasb_kernels import load_adapter

load_adapter(model, "...")  # model: the base model; "...": this folder or repository
```

Without lorasb_kernels: `export_peft(model, folder)` writes it as a plain LoRA for peft and servers,
and `lorasb merge` a whole model for transformers.
"""


def public_name(name: str | None) -> str | None:
    """The name of a base model without the folders of this machine."""
    return name if not name or is_hub_id(name) else Path(name).name


def is_hub_id(name: str) -> bool:
    """Whether a name is one of the hub and not of a folder here."""
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def write_card(directory: Path, record: Record, base_model: str | None) -> None:
    """Writes the card, unless there is one already, which may be the user's.

    Args:
        directory: of the adapter.
        record: of the adapter.
        base_model: its hub id or folder, if known.
    """
    path = directory / CARD_FILE
    if path.exists():
        return
    config = record.config
    known = base_model is not None and is_hub_id(base_model)
    targets = config.target_modules
    text = _CARD.format(
        base_line=f"base_model: {base_model}\n" if known else "",
        base=public_name(base_model) or "a model without a name",
        method=config.init,
        layers=len(record.layers),
        r=config.r,
        s=config.s,
        targets=targets if isinstance(targets, str) else ", ".join(targets),
        dropout=config.dropout,
        saved=", ".join(config.modules_to_save) or "none",
    )
    write_text(path, text)


__all__ = ["CARD_FILE", "public_name", "write_card"]
