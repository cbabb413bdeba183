"""The model and its loss; `cpu_kernels` and `products` are for CPUs, `foreign` for models of other programs."""
