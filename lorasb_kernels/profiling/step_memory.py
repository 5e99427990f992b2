"""Predicted peak memory of a training step of an adapted model, by part.

Counts what torch allocates, from the shapes of the linear layers: the frozen weights, the adapters,
what autograd keeps from forward to backward, and the largest part of backward itself. Not counted:
norms' weights and biases, the CUDA context, the allocator's fragmentation.
"""

from dataclasses import dataclass

from lorasb_kernels.profiling.shapes import Layer, Preset

FP32 = 4


@dataclass(frozen=True)
class Precision:
    """How a model's frozen weights are held.

    Args:
        name: as tables show it.
        dtype: of activations, A, B, embedding and head.
        bytes: of an element of `dtype`.
        bits: of a weight of the blocks, scales included.
    """

    name: str
    dtype: str
    bytes: int
    bits: float

    @property
    def quantized(self) -> bool:
        """Whether a layer's weight is dequantized for each product."""
        return self.bits < 8 * self.bytes


# 4-bit: bitsandbytes' NF4 with an fp32 scale for each block of 64, activations in bf16.
PRECISIONS = (
    Precision("bf16", "bfloat16", 2, 16),
    Precision("fp32", "float32", 4, 32),
    Precision("4-bit", "bfloat16", 2, 4.5),
)


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the peak of a training step; `total` is their sum.

    Args:
        weights: the frozen model.
        adapters: A and B; R, its gradient and Adam's two moments.
        kept: from forward for backward.
        backward: at its peak: the loss and the gradients of logits, or of a block.
    """

    weights: int
    adapters: int
    kept: int
    backward: int

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.adapters + self.kept + self.backward


def step_memory(
    model: Preset, precision: Precision, *, r: int, tokens: int, recompute: bool = False
) -> StepMemory:
    """PREDICTION: the memory of a step of LoRA-SB on all linear layers of the blocks.

    Args:
        model: a preset.
        precision: of the frozen weights.
        r: rank.
        tokens: M, of a micro-batch, padding included; all of them labelled.
        recompute: gradient checkpointing: only the inputs of blocks are kept.
    """
    e, hidden = precision.bytes, model.layers[0].n
    kept = block_activations(model, precision, r)
    # Logits' log-softmax, its gradient and that of the loss, in fp32; the last norm's input.
    loss = FP32 * tokens * (3 * model.vocabulary + hidden)
    block = tokens * gradients_of_block(model, precision)
    if precision.quantized:
        block += max(layer.n * layer.m for layer in model.layers) * e
    if recompute:
        # In fp32 the first norm of a gated block keeps the block's input, which is kept anyway.
        shared = e * hidden if e == FP32 and is_gated(model) else 0
        block += tokens * (kept - shared)
    return StepMemory(
        weights_bytes(model, precision),
        adapter_bytes(model, precision, r),
        model.blocks * tokens * (e * hidden if recompute else kept),
        max(loss, block),
    )


def weights_bytes(model: Preset, precision: Precision) -> int:
    """Bytes of the frozen weights: blocks, embedding, head."""
    blocks = model.blocks * sum(layer.n * layer.m for layer in model.layers)
    tables = model.vocabulary * model.layers[0].n * (1 if model.tied else 2)
    return int(blocks * precision.bits / 8) + tables * precision.bytes


def adapter_bytes(model: Preset, precision: Precision, r: int) -> int:
    """Bytes of A and B, and of R with its gradient and Adam's moments in fp32."""
    factors = sum(precision.bytes * r * (layer.n + layer.m) for layer in model.layers)
    return model.blocks * (factors + len(model.layers) * 4 * FP32 * r * r)


def block_activations(model: Preset, precision: Precision, r: int) -> int:
    """Bytes for each token that autograd keeps of a block, of which adapted layers keep h only.

    Gated blocks as transformers runs Llama's: two RMS norms keep their input in fp32; attention
    keeps q, k, v, its output and a number for each head (left out); the gate keeps its input, its
    output and what it multiplies. Other blocks as transformers runs BERT's: two layer norms keep
    their input, two dropouts a mask of a byte, the activation its input.
    """
    e, hidden = precision.bytes, model.layers[0].n
    names: dict[str, Layer] = {layer.name: layer for layer in model.layers}
    kept = e * r * len(model.layers)
    wide = max(layer.m for layer in model.layers)
    if is_gated(model):
        attention = 2 * names["q_proj"].m + names["k_proj"].m + names["v_proj"].m
        return kept + 2 * FP32 * hidden + e * (attention + 3 * wide)
    return kept + 2 * (e + 1) * hidden + e * (4 * hidden + wide)


def is_gated(model: Preset) -> bool:
    """Whether a block's widest layers are a gate and what it multiplies, as in Llama."""
    return any(layer.name == "gate_proj" for layer in model.layers)


def gradients_of_block(model: Preset, precision: Precision) -> int:
    """Bytes for each token where a block's backward pass holds most: the gradients of a product of
    gate and values, of the gate, of the values, and of the block's output."""
    hidden, wide = model.layers[0].n, max(layer.m for layer in model.layers)
    return precision.bytes * (3 * wide + hidden)


__all__ = [
    "PRECISIONS",
    "Precision",
    "StepMemory",
    "adapter_bytes",
    "block_activations",
    "step_memory",
    "weights_bytes",
]
