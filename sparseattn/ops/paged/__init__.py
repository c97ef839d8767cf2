"""Attention over paged caches of keys and values: decode, append and prefill, mixed in one batch."""

from sparseattn.ops.paged.api import paged_attention as paged_attention
from sparseattn.ops.paged.api import unsupported_reason as unsupported_reason
from sparseattn.ops.paged.cache import PagedCache as PagedCache
from sparseattn.ops.paged.checks import IMPLEMENTATIONS as IMPLEMENTATIONS
from sparseattn.ops.paged.options import ALiBi as ALiBi
from sparseattn.ops.paged.options import CustomMask as CustomMask
from sparseattn.ops.paged.options import PageLists as PageLists
from sparseattn.ops.paged.options import RoPE as RoPE
from sparseattn.ops.paged.pages import append_kv as append_kv
from sparseattn.ops.paged.pages import appended_positions as appended_positions
from sparseattn.ops.paged.pages import copy_vectors as copy_vectors
from sparseattn.ops.paged.pages import lengths_from_last_pages as lengths_from_last_pages
from sparseattn.ops.paged.pages import packbits as packbits
from sparseattn.ops.paged.pages import segment_packbits as segment_packbits
from sparseattn.ops.paged.repeat import RepeatedAttention as RepeatedAttention
