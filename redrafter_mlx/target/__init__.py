"""The model whose text must not change: any mlx-lm model, made ready to verify a token tree.

Its hidden states (`capture`), KV cache (`cache`), rope (`rope`) and output rows (`rows`).
"""

from .target import Target as Target
from .target import Verified as Verified
