"""Arrays to cells and back: token orders and codes, and the five encodings of values. Pure functions, no I/O.

The modules, from the bottom up:

- `cells`: one column of one sequence as bytes (pcodec).
- `codes`: token ids as places in a chunk's token order.
- `bfloat16`: bfloat16 and float ordinals, and the search for the logits behind logprobs.
- `decode`: the one decoder of values: running sums, then scale and shift.
- `values`: the encodings `grid`, `bfloat16`, `float16`, `float32` and `draws`.
"""
