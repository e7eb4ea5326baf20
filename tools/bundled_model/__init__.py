"""Makes the bundled demonstration model: generated text, tokenizer, training, export and evaluation."""
