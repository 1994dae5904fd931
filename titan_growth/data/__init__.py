"""From text to batches.

A corpus (`corpora`) is tokenized once (`tokenizers`) into memory-mapped shards (`preparation`, opened by `prepared`).
Training reads an endless, shuffled, random-access sequence of fixed-length blocks (`blocks`). One integer, the cursor,
records how far it has read (`loader`).
"""
