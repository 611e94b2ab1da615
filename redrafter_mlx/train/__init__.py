"""Self-distillation: the target writes text, a drafter learns to guess it."""
