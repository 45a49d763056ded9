"""What is made of a result: dense and 4-bit models, LoRA files, cards, uploads."""
