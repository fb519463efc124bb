"""Losses of the tokenizer beyond pixels; no network here scores anything."""
