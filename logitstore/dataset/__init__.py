"""A dataset: a directory of shards and the manifest that makes them one.

- `input`: what callers hand in, checked and brought into the format's order.
- `ids`: the ids seen so far.
- `writer`: `Writer`.
- `reader`: `Dataset`.
"""
