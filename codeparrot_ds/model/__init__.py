"""The model and its loss; what a CPU computes faster is in `cpu_kernels` and `products`."""
