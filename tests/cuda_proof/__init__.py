"""The proof of the CUDA side without a GPU: kernels on the CPU, their machine code, and a stand-in for CuPy."""
