"""Floor 2: base models, their storage, tokenizers and adapters."""
