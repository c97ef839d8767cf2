"""FlashInfer's attention API by its own names: ``import sparseattn.flashinfer as flashinfer``.

Every name is argument translation and a call of this library's operators, on CUDA (Triton) and on a CPU (reference)
alike; nothing is built. LSE is base 2, float32 ``[tokens, heads]``, everywhere. ``docs/flashinfer.md`` says what is
served, and where results are defined that FlashInfer leaves to chance.
"""

from sparseattn.flashinfer.attention import BatchAttention as BatchAttention
from sparseattn.flashinfer.attention import (
    BatchAttentionWithAttentionSinkWrapper as BatchAttentionWithAttentionSinkWrapper,
)
from sparseattn.flashinfer.cascade import (
    BatchDecodeWithSharedPrefixPagedKVCacheWrapper as BatchDecodeWithSharedPrefixPagedKVCacheWrapper,
)
from sparseattn.flashinfer.cascade import (
    BatchPrefillWithSharedPrefixPagedKVCacheWrapper as BatchPrefillWithSharedPrefixPagedKVCacheWrapper,
)
from sparseattn.flashinfer.cascade import MultiLevelCascadeAttentionWrapper as MultiLevelCascadeAttentionWrapper
from sparseattn.flashinfer.cascade import merge_state as merge_state
from sparseattn.flashinfer.cascade import merge_state_in_place as merge_state_in_place
from sparseattn.flashinfer.cascade import merge_states as merge_states
from sparseattn.flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper as BatchDecodeWithPagedKVCacheWrapper
from sparseattn.flashinfer.decode import (
    CUDAGraphBatchDecodeWithPagedKVCacheWrapper as CUDAGraphBatchDecodeWithPagedKVCacheWrapper,
)
from sparseattn.flashinfer.decode import cudnn_batch_decode_with_kv_cache as cudnn_batch_decode_with_kv_cache
from sparseattn.flashinfer.decode import fast_decode_plan as fast_decode_plan
from sparseattn.flashinfer.decode import single_decode_with_kv_cache as single_decode_with_kv_cache
from sparseattn.flashinfer.decode import trtllm_batch_decode_with_kv_cache as trtllm_batch_decode_with_kv_cache
from sparseattn.flashinfer.decode import xqa_batch_decode_with_kv_cache as xqa_batch_decode_with_kv_cache
from sparseattn.flashinfer.mla import BatchMLAPagedAttentionWrapper as BatchMLAPagedAttentionWrapper
from sparseattn.flashinfer.mla import trtllm_batch_decode_with_kv_cache_mla as trtllm_batch_decode_with_kv_cache_mla
from sparseattn.flashinfer.page import append_paged_kv_cache as append_paged_kv_cache
from sparseattn.flashinfer.page import append_paged_mla_kv_cache as append_paged_mla_kv_cache
from sparseattn.flashinfer.page import get_batch_indices_positions as get_batch_indices_positions
from sparseattn.flashinfer.page import get_seq_lens as get_seq_lens
from sparseattn.flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper as BatchPrefillWithPagedKVCacheWrapper
from sparseattn.flashinfer.prefill import BatchPrefillWithRaggedKVCacheWrapper as BatchPrefillWithRaggedKVCacheWrapper
from sparseattn.flashinfer.prefill import cudnn_batch_prefill_with_kv_cache as cudnn_batch_prefill_with_kv_cache
from sparseattn.flashinfer.prefill import single_prefill_with_kv_cache as single_prefill_with_kv_cache
from sparseattn.flashinfer.prefill import (
    single_prefill_with_kv_cache_return_lse as single_prefill_with_kv_cache_return_lse,
)
from sparseattn.flashinfer.prefill import trtllm_batch_context_with_kv_cache as trtllm_batch_context_with_kv_cache
from sparseattn.flashinfer.quantization import packbits as packbits
from sparseattn.flashinfer.quantization import segment_packbits as segment_packbits
from sparseattn.flashinfer.sparse import BlockSparseAttentionWrapper as BlockSparseAttentionWrapper
from sparseattn.flashinfer.sparse import (
    VariableBlockSparseAttentionWrapper as VariableBlockSparseAttentionWrapper,
)
from sparseattn.flashinfer.sparse import convert_bsr_mask_layout as convert_bsr_mask_layout
from sparseattn.flashinfer.xqa import xqa as xqa
from sparseattn.flashinfer.xqa import xqa_mla as xqa_mla
