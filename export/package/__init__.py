"""What travels with a program: model card, tokenizer, generation settings; upload to a hub."""
