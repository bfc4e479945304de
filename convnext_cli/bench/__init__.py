"""Paired measurements against named peers; `convnext bench` runs them."""
