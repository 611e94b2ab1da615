"""What guesses the next tokens, one file a kind: `recurrent`, `lookup`, `speculator`, `medusa`, `hydra`.

`interface` says what a drafter is, `beam` makes one of anything that guesses level by level, `heads` is what Medusa
and Hydra share, `prefix` a layer over the text so far, `quantization` rounds weights, `suffixes` and `history` are what
is looked up in, `kinds` loads and saves every kind. A new kind is one new file and one line in `kinds`.
"""
