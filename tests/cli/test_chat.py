"""`lorasb chat`: the answers are the adapted model's, in the prompt it was trained with."""

import io

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorasb_kernels
from lorasb_kernels.cli.main import main
from lorasb_kernels.train.chat import Talk, load
from lorasb_kernels.train.encoding import Encoder
from lorasb_kernels.train.samples import Conversation, Example
from tests.cli.test_main import flags

SHORT = ["--max-new-tokens", "4"]


@pytest.fixture
def run(llama, sums_file, tmp_path):
    """A run of LoRA-SB that changes what the tiny model says."""
    folder = tmp_path / "run"
    assert main(["train", *flags(llama, sums_file, folder, "--learning-rate", "0.2")]) == 0
    return folder


def greedy(model, ids, count):
    """The likeliest next tokens, by whole forward passes."""
    for _ in range(count):
        with torch.no_grad():
            following = model(torch.tensor([ids])).logits[0, -1].argmax().item()
        ids = [*ids, following]
        if following == 2:  # the end of the turn
            break
    return ids


def expected_answer(model, encoder, conversation, count=4):
    prompt = encoder.question(conversation)
    said = greedy(model, prompt, count)[len(prompt) :]
    return encoder.tokenizer.decode(said, skip_special_tokens=True)


def test_one_question_is_answered_as_trained(run, llama, tokenizer, capsys):
    adapted = AutoModelForCausalLM.from_pretrained(llama)
    lorasb_kernels.load_adapter(adapted, run / "adapter")
    encoder = Encoder(tokenizer, 64)
    answer = expected_answer(adapted, encoder, Example("two plus two", ""))
    base = AutoModelForCausalLM.from_pretrained(llama)
    assert answer != expected_answer(base, encoder, Example("two plus two", ""))
    capsys.readouterr()
    assert main(["chat", "--run", str(run), "--prompt", "two plus two", *SHORT]) == 0
    assert capsys.readouterr().out.strip() == answer
    parts = ["--model", str(llama), "--adapter", str(run / "adapter")]
    assert main(["chat", *parts, "--prompt", "two plus two", *SHORT]) == 0
    assert capsys.readouterr().out.strip() == answer


def test_an_adapter_of_peft_answers_alike(run, llama, tmp_path, capsys):
    adapted = AutoModelForCausalLM.from_pretrained(llama)
    lorasb_kernels.load_adapter(adapted, run / "adapter")
    lorasb_kernels.export_peft(adapted, tmp_path / "peft")
    asked = ["--prompt", "two plus two", *SHORT]
    capsys.readouterr()
    assert main(["chat", "--run", str(run), *asked]) == 0
    ours = capsys.readouterr().out
    parts = ["--model", str(llama), "--adapter", str(tmp_path / "peft")]
    assert main(["chat", *parts, *asked]) == 0
    assert capsys.readouterr().out == ours


def test_what_was_said_is_remembered(run, llama, capsys):
    model, encoder = load(str(llama), str(run / "adapter"), "very good")
    talk = Talk(model, encoder, max_new_tokens=4, do_sample=False)
    first = talk.ask("two plus two")
    roles = ("user", "assistant", "user", "assistant")
    turns = zip(roles, ("two plus two", first, "is it good", ""), strict=True)
    whole = Conversation(tuple({"role": role, "content": text} for role, text in turns))
    assert talk.ask("is it good") == expected_answer(model, encoder, whole)
    assert [message["role"] for message in talk.messages] == list(roles)
    assert "very good" in encoder.tokenizer.decode(encoder.question(whole))


def test_a_conversation_ends_with_its_input(run, llama, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("two plus two\nis it good\n"))
    capsys.readouterr()
    assert main(["chat", "--model", str(llama), *SHORT]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected either --run, or --model"),
        (["--run", "a", "--model", "b"], "expected either --run, or --model"),
        (["--run", "/nowhere"], "run is '/nowhere'"),
        (["--model", "/nowhere"], "model is '/nowhere'"),
        (["--model", "a", "--max-new-tokens", "0"], "--max-new-tokens is 0; expected at least 1"),
        (["--model", "a", "--temperature", "nan"], "--temperature is nan; expected at least 0"),
    ],
)
def test_what_cannot_be_asked_is_one_line(arguments, message, capsys):
    assert main(["chat", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_an_adapter_is_named(llama, tmp_path, capsys):
    parts = ["--model", str(llama), "--adapter", str(tmp_path), "--prompt", "one"]
    assert main(["chat", *parts]) == 2
    assert f"adapter is {str(tmp_path)!r}" in capsys.readouterr().err
