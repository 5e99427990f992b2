"""Estimates the first update from samples: sums of weight gradients, in bounded memory."""
