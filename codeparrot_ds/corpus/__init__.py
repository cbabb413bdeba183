"""From source trees to cleaned shards and a tokenizer."""
