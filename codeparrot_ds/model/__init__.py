"""The model and its loss; `cpu_kernels`, `products`: for CPUs; `loss_kernel`: for GPUs; `foreign`: others' models."""
