"""What guesses the next tokens, one file a kind: `recurrent`, `speculator`.

`interface` says what a drafter is, `beam` makes one of anything that guesses level by level, `kinds` loads and
saves every kind. A new kind is one new file and one line in `kinds`.
"""
