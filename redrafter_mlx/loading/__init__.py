"""Where weights come from: `load` puts a target, its drafter and its tokenizer together.

A folder or Hugging Face id (`hub`), a GGUF file (`gguf`), or the default model (`default_model`). The package is not
called `load`, because importing it would then hide the function of that name in `redrafter_mlx`.
"""
