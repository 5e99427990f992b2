"""The tiny models, tokenizer and rows of the trainer's tests, also for the commands."""

from tests.train.conftest import bert, llama, sums_file, tokenizer

__all__ = ["bert", "llama", "sums_file", "tokenizer"]
