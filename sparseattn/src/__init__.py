"""SparseAttn's documented functions, by its names: ``[batch, heads, tokens, head_dim]`` in and out, one call a layer.

Each is a selector of this library and its operator; nothing here computes attention. Importing it needs torch alone.
"""

from sparseattn.src.Flexprefill import Flexprefill_prefill as Flexprefill_prefill
from sparseattn.src.Fullprefill import Full_prefill as Full_prefill
from sparseattn.src.Minference import Minference_prefill as Minference_prefill
from sparseattn.src.utils import FastPrefillConfig as FastPrefillConfig
from sparseattn.src.Xattention import Xattention_prefill as Xattention_prefill
