"""Device functions shared by the Triton kernels: sequence spans, tile visibility, softmax pieces."""

# Launch options of every kernel. Their arithmetic counts on fused multiply-adds, which Triton 3.9 warns about and later
# releases leave out unless asked.
LAUNCH = {"enable_fp_fusion": True}
