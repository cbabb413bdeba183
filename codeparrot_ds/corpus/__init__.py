"""Building a corpus: from source trees and files of rows to cleaned, deduplicated shards and a tokenizer."""
