"""Truncated singular value decompositions, from dense matrices or packed signs."""
