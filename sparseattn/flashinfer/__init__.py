"""FlashInfer's attention API by its own names: ``import sparseattn.flashinfer as flashinfer``.

Every name is argument translation and a call of this library's operators, on CUDA (Triton) and on a CPU (reference)
alike; nothing is built. LSE is base 2, float32 ``[tokens, heads]``, everywhere. ``docs/flashinfer.md`` says what is
served, and where results are defined that FlashInfer leaves to chance.
"""
