"""From text to tokens: the tokenizer of a backbone, and which of its tokens are words, special, or padding."""
