"""DeepSpeed's engine and every private part of it that is touched: fixes, fragments, operators, ranks."""
