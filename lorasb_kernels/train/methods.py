"""Preparing a model for training: this library's adapters, peft's, or all weights."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from lorasb_kernels.config import LoRASBConfig
from lorasb_kernels.init.estimation.losses import per_sample_loss
from lorasb_kernels.ops.dispatch import obstacle
from lorasb_kernels.targets import find_targets
from lorasb_kernels.train import changed_base
from lorasb_kernels.train.config import ADAPTER_METHODS, TrainConfig
from lorasb_kernels.train.encoding import Encoded
from lorasb_kernels.train.errors import ConfigError, setting_errors
from lorasb_kernels.train.output_folder import ADAPTER_FOLDER
from lorasb_kernels.train.start_samples import fixed_count, measured_count, start_batches
from lorasb_kernels.train.warm_start import seed_of, start_from
from lorasb_kernels.utils.files import atomic_folder


def heads(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules on top of the base model that have parameters."""
    body = model.base_model_prefix
    return tuple(
        name
        for name, module in model.named_children()
        if name != body and any(True for _ in module.parameters())
    )


def prepare(
    model: nn.Module,
    config: TrainConfig,
    samples: Sequence[Encoded],
    pad_token_id: int,
    eta: float,
    found: Path | None = None,
    progress: bool = True,
) -> nn.Module:
    """Makes `model` trainable by `config.method`. Writes nothing.

    Args:
        model: the pretrained model.
        config: the run.
        samples: the training samples; a share of them estimates the first update, where the
            method starts from one.
        pad_token_id: of the tokenizer.
        eta: η of LoRA-SB.
        found: a saved adapter that adapters of this library start from instead of a new one.
        progress: show progress bars.

    Returns:
        the model to train; frozen weights in `config.dtype`, trained ones in fp32.

    Raises:
        ConfigError: settings that do not fit the model, the device or the adapter found.
    """
    with setting_errors():
        if config.method == "full":
            model.requires_grad_(True)
        elif config.method not in ADAPTER_METHODS:
            model = _with_peft(model, config, samples, pad_token_id)
        elif found is not None:
            _check_backend(model, config)
            _load_found(model, found, adapter_config(model, config))
        else:
            _check_backend(model, config)
            _with_new_adapter(model, config, samples, pad_token_id, eta, progress)
        return _trainable(model, config)


def _trainable(model: nn.Module, config: TrainConfig) -> nn.Module:
    """What is trained becomes fp32; activations are recomputed if the settings say so."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if config.gradient_checkpointing:
        # Renamed in the course of transformers 5.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()
    return model


def adapter_config(model: nn.Module, config: TrainConfig) -> LoRASBConfig:
    """The adapter that the settings of a run describe."""
    alpha = config.lora_alpha
    if alpha is None and config.init_facts.alpha_is_r:
        alpha = config.r
    return LoRASBConfig(
        r=config.r,
        target_modules=config.target_modules,
        init=config.adapter_init,
        lora_alpha=alpha,
        use_rslora=config.use_rslora,
        dropout=config.dropout,
        backend=config.backend,
        optimal_gradient=config.optimal_gradient,
        orthonormalize=config.orthonormalize,
        sigma_side=config.sigma_side,
        core_std=config.core_std,
        noise_std=config.noise_std,
        gamma=config.gamma,
        spectral_scaling=config.spectral_scaling,
        modules_to_save=heads(model) if config.task == "classification" else (),
        seed=config.seed if config.init_from is None else seed_of(config.init_from),
    )


def _check_backend(model: nn.Module, config: TrainConfig) -> None:
    weight = next(model.parameters())
    named = config.backend != "auto"
    if named and (reason := obstacle(config.backend, weight.device, weight.dtype)):
        raise ConfigError(f"backend is {config.backend!r}, which cannot run: {reason}")


def _with_new_adapter(model, config, samples, pad_token_id, eta, progress) -> None:
    from lorasb_kernels import EstimationOptions, adapt

    adapter = adapter_config(model, config)
    batches = None
    if config.init_facts.needs_gradients:
        device = next(model.parameters()).device
        count = fixed_count(config, len(samples))
        if config.init_samples == "auto":
            targets = find_targets(model, adapter.target_modules, adapter.modules_to_save)
            count, finding = measured_count(model, config, samples, pad_token_id, targets)
            if progress:
                print(finding)
        batches = start_batches(config, samples, pad_token_id, device, count)
    estimation = EstimationOptions(
        strategy=config.init_strategy, memory_budget=config.init_memory_budget
    )
    adapt(model, adapter, batches, learning_rate=eta, estimation=estimation, progress=progress)
    if config.init_from is not None:
        message = start_from(model, config.init_from)
        if progress:
            print(message)


def _load_found(model: nn.Module, folder: Path, expected: LoRASBConfig) -> None:
    """Loads the adapter in `folder`, which must be the one that the settings describe."""
    from lorasb_kernels import load_adapter
    from lorasb_kernels.io.record import CONFIG_FILE, read_config, read_fields
    from lorasb_kernels.io.subspace import UntrainedAdapterWarning

    found = read_config(read_fields(folder), folder / CONFIG_FILE).to_dict()
    for name, value in expected.to_dict().items():
        if found[name] != value:
            raise ConfigError(
                f"output_dir holds an adapter, {folder}, made with {name} = {found[name]!r} where "
                f"these settings say {value!r}; expected the same, or another output_dir"
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedAdapterWarning)  # training is what comes next
        load_adapter(model, folder)


def save_start(model: nn.Module, config: TrainConfig) -> None:
    """Saves the adapter that training starts from, marked as untrained, where there is one; and
    what a method took out of the base weights."""
    from lorasb_kernels import save_adapter

    if config.method in ADAPTER_METHODS:
        with atomic_folder(Path(config.output_dir) / ADAPTER_FOLDER) as building:
            save_adapter(model, building, trained=False)
    elif config.method in changed_base.METHODS:
        changed_base.keep_start(model, Path(config.output_dir))


def _with_peft(
    model: nn.Module, config: TrainConfig, samples: Sequence[Encoded], pad_token_id: int
) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"method is {config.method!r}, which needs the package peft: {error}"
        ) from error

    saved = heads(model) if config.task == "classification" else ()
    targets = find_targets(model, config.target_modules, saved)
    common = {
        "r": config.r,
        "target_modules": list(targets),
        "task_type": "CAUSAL_LM" if config.task == "causal-lm" else "SEQ_CLS",
    }
    torch.manual_seed(config.seed)
    if config.method == "vera":
        adapter = peft.VeraConfig(
            **common, vera_dropout=config.dropout, projection_prng_key=config.seed
        )
        return peft.get_peft_model(model, adapter)
    _check_rank(targets, config)
    inits = {"pissa": "pissa", "lora-ga": "lora_ga"}
    adapter = peft.LoraConfig(
        **common,
        lora_alpha=config.r if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=config.dropout,
        use_rslora=config.use_rslora,
        use_dora=config.method == "dora",
        init_lora_weights=inits.get(config.method, True),
        lora_ga_config=peft.LoraGAConfig() if config.method == "lora-ga" else None,
    )
    if config.method == "lora-ga":
        _gradients_for_lora_ga(model, targets, adapter, config, samples, pad_token_id)
    return peft.get_peft_model(model, adapter)


def _check_rank(targets: dict[str, nn.Linear], config: TrainConfig) -> None:
    """PiSSA takes r singular vectors of a layer, LoRA-GA r for A and the next r for B; peft would
    take as many as there are."""
    if config.method not in changed_base.METHODS:
        return
    for name, layer in targets.items():
        limit = min(layer.weight.shape) // (2 if config.method == "lora-ga" else 1)
        if config.r > limit:
            raise ConfigError(
                f"r is {config.r}; expected r <= {limit} for {name} by method {config.method!r}"
            )


def _gradients_for_lora_ga(model, targets, adapter, config, samples, pad_token_id) -> None:
    """Sums the gradients that LoRA-GA starts from, over `init_share` of the samples."""
    from peft.tuners.lora.loraga import preprocess_loraga

    device = next(model.parameters()).device
    count = fixed_count(config, len(samples))
    batches = start_batches(config, samples, pad_token_id, device, count)

    def backward() -> None:
        for batch in batches:
            per_sample_loss(model, batch).mean().backward()

    preprocess_loraga(model, adapter, backward)
    model.zero_grad(set_to_none=True)
