"""What guesses the next tokens, by kind: `recurrent`, with its network and its config, and `speculator`.

`interface` says what a drafter is, `beam` makes one of anything that guesses level by level, `quantization` rounds its
weights, `kinds` loads and saves every kind. A new kind is one new file and one line in `kinds`.
"""
