"""`save_pretrained` and `push_to_hub` of an adapted transformers model: the adapter, not the base.

transformers would write W beside `lora_A`, `lora_B` and `lora_R` under names that
`from_pretrained` reads back as the untrained base. Instead an adapted model writes

    lorasb_config.json, subspace.safetensors, adapter.safetensors   for `load_adapter`
    adapter_config.json, adapter_model.safetensors                  the same function as LoRA
    model.safetensors                                               A, B, R and the saved modules

With the second, `from_pretrained(folder)` gives the trained function where peft is installed, as
for any adapter of peft; servers of LoRA read it, too. With the third, under the names they have in
the model, transformers' `Trainer` resumes from its checkpoints and loads the best one.

`push_to_hub` uploads the same files. transformers' own would replace the card of the adapter by one
that says nothing of the base and the method.
"""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorasb_kernels.io.layer_tensors import refuse_merged
from lorasb_kernels.io.model_card import CARD_FILE
from lorasb_kernels.io.peft_export import export_peft
from lorasb_kernels.io.save import save_adapter
from lorasb_kernels.io.tensors import saved_tensors
from lorasb_kernels.targets import find_saved_modules, layers_of
from lorasb_kernels.utils.files import write_tensors

TRAINER_FILE = "model.safetensors"
_MARK = "_saves_adapter_only"


class _AdapterOnly:
    """Marks a model whose `save_pretrained` and `push_to_hub` take its adapter.

    The methods of its class look for the mark. A method of the instance would refer to the model
    and keep its memory until the garbage collector runs. Copies and pickles keep the mark.
    """

    def __init__(self, owner: type):
        self.owner = owner
        if not hasattr(owner.save_pretrained, "looks_for_the_mark"):
            owner.save_pretrained = _looking_for_the_mark(owner.save_pretrained, save_pretrained)
            if hasattr(owner, "push_to_hub"):
                owner.push_to_hub = _looking_for_the_mark(owner.push_to_hub, push_to_hub)

    def __reduce__(self) -> tuple:
        return _AdapterOnly, (self.owner,)


def _looking_for_the_mark(original: Callable, ours: Callable) -> Callable:
    @functools.wraps(original)
    def method(self: nn.Module, *args: Any, **options: Any) -> Any:
        if _MARK in vars(self):
            return ours(self, *args, **options)
        return original(self, *args, **options)

    method.looks_for_the_mark = True
    return method


def save_adapter_only(model: nn.Module) -> None:
    """Makes `save_pretrained` and `push_to_hub` take the adapter, if the model has them."""
    owners = [kind for kind in type(model).__mro__ if "save_pretrained" in vars(kind)]
    if owners:
        setattr(model, _MARK, _AdapterOnly(owners[0]))


def save_whole_again(model: nn.Module) -> None:
    """Undoes `save_adapter_only`."""
    vars(model).pop(_MARK, None)


def save_pretrained(
    model: nn.Module,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: dict[str, torch.Tensor] | None = None,
    push_to_hub: bool = False,
    **_,
) -> None:
    """Writes the adapter of `model` for `load_adapter`, `from_pretrained` and `Trainer`.

    Args:
        model: an adapted transformers model.
        save_directory: created if missing.
        is_main_process: whether this process is the one that writes.
        state_dict: ignored, as transformers' `Trainer` passes it for the whole model.
        push_to_hub: not supported; `model.push_to_hub(...)` is.
        _: what else transformers takes; all of it concerns the base model's files.

    Raises:
        ValueError: a merged layer, sharded parameters (which every rank must gather),
            `push_to_hub`, or `save_directory` holds the base model.
    """
    if push_to_hub:
        raise ValueError(
            "push_to_hub is True; expected save_pretrained(folder), then model.push_to_hub(name)"
        )
    layers = layers_of(model)
    refuse_merged(layers, "save_pretrained(); merge_and_unload() gives a plain model to save")
    for name, tensor in model.state_dict(keep_vars=True).items():
        if hasattr(tensor, "full_tensor"):  # gathering it here would wait for the other ranks
            raise ValueError(
                f"{name} is sharded over ranks; expected save_adapter(), called by every rank"
            )
    if not is_main_process:
        return
    directory = Path(save_directory)
    if (directory / "config.json").exists():
        raise ValueError(
            f"save_directory {str(directory)!r} holds a model; expected a folder of the adapter's "
            "own, as its model.safetensors would replace that model's weights"
        )
    save_adapter(model, directory)
    export_peft(model, directory)
    saved = saved_tensors(find_saved_modules(model, model.lorasb_config.modules_to_save))
    factors = {f"{n}.{f}": t for n, layer in layers.items() for f, t in layer.factors().items()}
    write_tensors(directory / TRAINER_FILE, factors | saved, {"format": "pt"})


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    commit_message: str = "Upload adapter",
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
    max_shard_size: int | str | None = None,
) -> Any:
    """Uploads what `save_pretrained` writes; a card that the repository has already is kept.

    Args:
        model: an adapted transformers model.
        repo_id: of the repository on the hub, created if missing.
        commit_message, commit_description, private, token, revision, create_pr: as in
            transformers' method of this name.
        tags: added to the new card.
        max_shard_size: ignored, as an adapter is one file.

    Returns:
        huggingface_hub's `CommitInfo`.

    Raises:
        ValueError: as `save_pretrained`; nothing is uploaded then.
    """
    from huggingface_hub import HfApi, ModelCard  # installed wherever transformers is

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        if tags:
            card = ModelCard.load(Path(folder) / CARD_FILE)
            card.data.tags = [*card.data.tags, *tags]
            card.save(Path(folder) / CARD_FILE)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        has_card = api.file_exists(repo_id, CARD_FILE, revision=revision)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            ignore_patterns=[CARD_FILE] if has_card else None,
        )


__all__ = ["push_to_hub", "save_adapter_only", "save_pretrained", "save_whole_again"]
