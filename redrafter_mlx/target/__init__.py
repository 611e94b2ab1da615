"""The model whose text must not change: any mlx-lm model, made ready to verify drafts.

Its parts (`capture`), what its layers keep (`cache`, `keys_values`, `recurrent`), where rows stand (`positions`,
`rope`), what it can verify (`check`) and its output rows (`rows`).
"""

from .target import Target as Target
from .target import Verified as Verified
