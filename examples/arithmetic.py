"""SmolLM2-135M learns grade-school word problems with LoRA-SB, preset `arithmetic`.

The problems come from the package `reasoning-gym` (`gsm_symbolic`: 85 templates in GSM8K's
format, worked answers that end in `#### N`). Whole templates are held out, so that the test
asks for kinds of problems that are not in the training set, not only for other numbers. An answer
is right if its final number is exactly the expected one.

    python examples/arithmetic.py            # for one GPU: 12 800 problems, 400 steps of 32
    python examples/arithmetic.py --tiny     # a few minutes on two CPU cores, to see it run
"""

import argparse

from transformers.utils import logging

from lorasb_kernels.train.demo import assets
from lorasb_kernels.train.evaluation import generate
from lorasb_kernels.train.progress import console
from lorasb_kernels.train.run import finetune
from lorasb_kernels.train.samples import Example
from lorasb_kernels.train.settings_file import resolve
from lorasb_kernels.train.summary import runs_table

HELD_OUT_TEMPLATES = set(range(0, 100, 6))  # every sixth
GPU = {"train": 12_800, "test": 512, "settings": {"batch_size": 32, "init_minimum": 32}}
TINY = {
    "train": 64,
    "test": 8,
    "settings": {
        "dtype": "float32",
        "batch_size": 4,
        "max_length": 256,
        "max_new_tokens": 32,
        "init_minimum": 8,
    },
}


def problems(train: int, test: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Problems to train on, and problems of other templates to test with."""
    import reasoning_gym

    size = 8 * (train + test)
    dataset = reasoning_gym.create_dataset("gsm_symbolic", size=size, seed=seed)
    parts = ([], [])
    for i, template in enumerate(dataset.task_indices):
        held_out = template in HELD_OUT_TEMPLATES
        if len(parts[held_out]) < (train, test)[held_out]:
            row = dataset[i]
            parts[held_out].append(Example(row["question"], row["metadata"]["answer_cot"]))
    return parts


def main() -> None:
    """Trains and prints exact-answer accuracy before and after, and one worked answer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="settings for a few minutes on a CPU")
    parser.add_argument("--r", type=int, default=32, help="rank (default 32)")
    parser.add_argument("--learning-rate", type=float, help="default: the preset's, 1e-4")
    parser.add_argument("--output-dir", default="out/arithmetic", help="default out/arithmetic")
    options = parser.parse_args()

    logging.disable_progress_bar()
    size = TINY if options.tiny else GPU
    batch = size["settings"]["batch_size"]
    settings = {
        "preset": "arithmetic",
        "template": None,  # the model's own chat template
        "model": str(assets.smollm2()),
        "data": "gsm_symbolic",
        "output_dir": options.output_dir,
        "r": options.r,
        "accumulation": 32 // batch,
        **size["settings"],
    }
    if options.learning_rate is not None:
        settings["learning_rate"] = options.learning_rate
    train, test = problems(size["train"], size["test"], seed=0)
    model, encoder, result = finetune(resolve(settings), train, test, judge_before=True)
    console.print(runs_table([result]))
    console.print(f"exact answers: {result.before:.3f} → {result.after:.3f} of {len(test)}")
    prompt = encoder.question(test[0])
    console.print(test[0].instruction)
    tokens = result.config.max_new_tokens or 256
    console.print(generate(model.eval(), encoder, [prompt], tokens)[0])


if __name__ == "__main__":
    main()
