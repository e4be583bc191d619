"""Text to batches: sources, tokenizer, token cache, prepare, loader, and n-gram baselines.

`corpus` turns each source of documents into a token cache once; a `Loader` cuts any length of
window out of those caches and hands out batches that depend on the seed and the step alone.
"""
