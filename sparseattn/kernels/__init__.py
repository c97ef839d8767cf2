"""Device functions shared by the Triton kernels: sequence spans, tile visibility, softmax pieces."""
