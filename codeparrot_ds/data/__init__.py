"""From shards to micro-batches: finding and reading data sets, and packing the rows of training and validation."""
