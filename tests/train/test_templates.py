"""The prompts of the papers' public codes, to the byte, and how they become tokens."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lorasb_kernels.init.estimation.losses import IGNORED
from lorasb_kernels.train.encoding import Encoder
from lorasb_kernels.train.samples import Example
from lorasb_kernels.train.templates import TEMPLATES

TASK = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
TASK_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request."
)
ARITHMETIC = f"{TASK}\n\n### Instruction:\nAdd.\n\n### Response:"
FLAT = f"{TASK}\n\n### Instruction:\nAdd.\n\n### Response:\n"
FLAT_WITH_INPUT = (
    f"{TASK_WITH_INPUT}\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
)


def indented(start: str, spaces: int, with_input: bool = False) -> str:
    blank = " " * spaces
    given = f"{blank}### Input:\n{blank}1 2\n\n" if with_input else ""
    return (
        f"{start}\n\n{blank}### Instruction:\n{blank}Add.\n\n{given}{blank}### Response:\n{blank}"
    )


# template, prompt of training without and with an input, of judging without and with, and what
# follows it there
PUBLISHED = [
    # LoRA-SB, utils/data_utils.py and gsm8k_eval.py; LoRA-XS, main_math_tuning.py, the same.
    ("alpaca", ARITHMETIC, None, ARITHMETIC, None, " Let's think step by step."),
    # LoRA-SB, utils/data_utils.py (indented by its source) and commonsense_eval.py.
    (
        "commonsense-lora-sb",
        indented(TASK, 12),
        indented(TASK_WITH_INPUT, 12, True),
        FLAT,
        FLAT_WITH_INPUT,
        "",
    ),
    # LoRA-XS, main_commonsense_tuning.py and commonsense_eval.py.
    (
        "commonsense-lora-xs",
        indented(f"{TASK}  ", 16),
        indented(f"{TASK_WITH_INPUT} ", 16, True),
        indented(f"{TASK} ", 16),
        indented(TASK_WITH_INPUT, 16, True),
        "",
    ),
    # LoRA-One, data.py and eval_gsm8k.py, eval_commonsense.py.
    ("question", "Q: Add.\nA: ", None, "Q: Add.\nA: ", None, " "),
    ("commonsense-lora-one", FLAT, None, FLAT, None, ""),
]


@pytest.mark.parametrize("row", PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_prompts_are_those_of_the_public_codes(row):
    name, training, training_with_input, judging, judging_with_input, prefix = row
    template = TEMPLATES[name]
    plain, with_input = Example("Add.", "3"), Example("Add.", "3", input="1 2")
    assert template.training.fill(plain) == training
    assert template.judging.fill(plain) == judging
    assert template.response_prefix == prefix
    if training_with_input:
        assert template.training.fill(with_input) == training_with_input
        assert template.judging.fill(with_input) == judging_with_input
    else:
        assert "1 2" in template.training.fill(with_input)


def test_every_template_is_pinned():
    assert {row[0] for row in PUBLISHED} == set(TEMPLATES)


def test_braces_of_a_problem_are_text():
    example = Example(r"Simplify $\frac{1}{2}$ {instruction}.", "")
    assert r"Simplify $\frac{1}{2}$ {instruction}." in TEMPLATES["alpaca"].training.fill(example)


@pytest.fixture(scope="module")
def bytewise():
    """A tokenizer that loses no byte, puts a token before each text and one after it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<s>", "</s>", *alphabet]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_hold_prompt_and_response_to_the_byte(bytewise, name):
    template, example = TEMPLATES[name], Example("Add.", "It is 3.", input="1 2")
    encoder = Encoder(bytewise, 4096, template=template)
    (sample,) = encoder.examples([example])
    prompt = template.training.fill(example)
    text = prompt + template.response_start + example.response
    assert bytewise.decode(sample.input_ids) == f"<s>{text}</s>"
    labelled = [label for label in sample.labels if label != IGNORED]
    assert bytewise.decode(labelled) == f"{template.response_start}{example.response}</s>"
    asked = bytewise.decode(encoder.question(example))
    assert asked == "<s>" + template.judging.fill(example) + template.response_prefix
    assert encoder.stops == template.stop


def test_prefix_and_stops_can_be_given(bytewise):
    encoder = Encoder(bytewise, 4096, None, TEMPLATES["alpaca"], "So", ("END",))
    assert bytewise.decode(encoder.question(Example("Add.", ""))).endswith("### Response:So")
    assert encoder.stops == ("END",)
