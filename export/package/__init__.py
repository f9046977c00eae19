"""Files that accompany a program: model card, tokenizer, generation settings; hub upload."""
