"""Operations: one file each; `reference.py` is the whole method in plain PyTorch."""
