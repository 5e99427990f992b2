"""Prompts by name: those of the papers' public code, byte for byte, and this library's own.

If a public code uses different prompts for training and evaluation, so does the template; an
indentation that looks like an accident is in the public code.
"""

import textwrap
from dataclasses import dataclass

from lorasb_kernels.train.samples import Example

STOP = ("Instruction:", "Instruction", "Response:", "Response")
_TASK = "Below is an instruction that describes a task"
_WRITE = "Write a response that appropriately completes the request."
_SECTIONS = "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
_SECTIONS_WITH_INPUT = (
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Prompt:
    """The text before a response, without and with a separate input.

    Args:
        plain: holds `{instruction}`.
        with_input: holds `{instruction}` and `{input}`; empty: the input follows the instruction
            on a new line.
    """

    plain: str
    with_input: str = ""

    def fill(self, example: Example) -> str:
        """The prompt of `example`."""
        if example.input and self.with_input:
            return self.with_input.format(instruction=example.instruction, input=example.input)
        return self.plain.format(instruction=instruction_text(example))


@dataclass(frozen=True)
class Template:
    """How a model is prompted.

    Args:
        training: prompt of a training sample, which the response follows directly.
        judging: prompt of an evaluation.
        response_start: stands before every response in training.
        response_prefix: the first words of the answer, given to the model in an evaluation.
        stop: texts at which a generated answer ends.
    """

    training: Prompt
    judging: Prompt
    response_start: str = ""
    response_prefix: str = ""
    stop: tuple[str, ...] = ()


def instruction_text(example: Example) -> str:
    """The instruction, with the input on a new line if there is one."""
    return f"{example.instruction}\n{example.input}" if example.input else example.instruction


def _indented(text: str, spaces: int) -> str:
    """`text` with the lines of its sections indented; the first line and empty ones are not."""
    first, rest = text.split("\n", 1)
    return first + "\n" + textwrap.indent(rest, " " * spaces) + " " * spaces


def _commonsense(end: str, end_with_input: str, spaces: int) -> Prompt:
    """The prompt of the commonsense papers; `end` follows the first line."""
    given = ", paired with an input that provides further context"
    plain = f"{_TASK}. {_WRITE}{end}{_SECTIONS}"
    with_input = f"{_TASK}{given}. {_WRITE}{end_with_input}{_SECTIONS_WITH_INPUT}"
    if spaces:
        plain, with_input = _indented(plain, spaces), _indented(with_input, spaces)
    return Prompt(plain, with_input)


_ALPACA = Prompt(f"{_TASK}. {_WRITE}\n\n### Instruction:\n{{instruction}}\n\n### Response:")
_FLAT = _commonsense("", "", 0)
_QUESTION = Prompt("Q: {instruction}\nA: ")
_ONE = Prompt(_FLAT.plain, _SECTIONS_WITH_INPUT.removeprefix("\n\n"))

PLAIN = Template(  # for tokenizers without a chat template
    Prompt("### Instruction:\n{instruction}\n\n### Response:\n"),
    Prompt("### Instruction:\n{instruction}\n\n### Response:\n"),
    stop=("### Instruction:",),
)
TEMPLATES = {
    # Arithmetic reasoning of LoRA-SB and LoRA-XS.
    "alpaca": Template(_ALPACA, _ALPACA, response_prefix=" Let's think step by step.", stop=STOP),
    # Commonsense reasoning: LoRA-SB trains with twelve spaces and is evaluated without.
    "commonsense-lora-sb": Template(_commonsense("", "", 12), _FLAT, stop=STOP),
    # LoRA-XS ends the first line with one or two spaces and indents by sixteen, always.
    "commonsense-lora-xs": Template(
        _commonsense("  ", " ", 16), _commonsense(" ", "", 16), stop=STOP
    ),
    # LoRA-One.
    "question": Template(_QUESTION, _QUESTION, response_start=" ", response_prefix=" "),
    "commonsense-lora-one": Template(_ONE, _ONE, response_start=" ", stop=STOP),
}
