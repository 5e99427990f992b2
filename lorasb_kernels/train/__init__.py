"""The reference trainer and the command line, on top of transformers' Trainer."""
