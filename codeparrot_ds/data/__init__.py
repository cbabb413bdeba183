"""The data path: corpus and tokenizer building, and the stream of packed rows that training and validation read."""
