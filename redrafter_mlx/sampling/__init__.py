"""From logits to the target's own token: settings, filters, penalties, and noise keyed by position.

choice = argmax(filter(logits) / T + gumbel(seed, position)) is a draw from softmax(filter(logits) / T). The noise
depends on nothing but the seed and the token's absolute position, so the text is a function of model, prompt, settings
and seed, whatever was drafted (docs/algorithm.md, "Sampling").

What a caller sets (`settings`), which tokens may be drawn (`filters`), repeated ones held back (`penalties`), the noise
(`noise`), and the choice made of them (`sampler`).
"""

from .sampler import Sampler as Sampler
from .settings import Sampling as Sampling
