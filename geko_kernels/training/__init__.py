"""Training with selection: the sampler (plain torch) and the trainer (on Hugging Face Transformers)."""
