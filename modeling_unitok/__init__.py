"""Model-side code: the image tokenizer, the GPT around it, and generation."""
