"""One file of a dataset: chunks, the index behind them, and the tail (spec, "Shard").

- `layout`: index records and the tail, written and read side by side.
- `chunk`: sequences to an Arrow message and back.
- `writer`, `reader`: a whole shard.
"""
