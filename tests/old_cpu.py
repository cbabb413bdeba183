"""What makes a newer x86 CPU behave, for PyTorch and for this project, like one with AVX2 alone."""

OLD_CPU = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
