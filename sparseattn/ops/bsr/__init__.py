"""Attention over block-sparse rows: blocks of R queries by C keys, any R and C, with masks inside the blocks."""

from sparseattn.ops.bsr.api import attend_rows as attend_rows
from sparseattn.ops.bsr.api import bsr_attention as bsr_attention
from sparseattn.ops.bsr.api import unsupported_reason as unsupported_reason
from sparseattn.ops.bsr.repeat import RepeatedRows as RepeatedRows
from sparseattn.ops.bsr.rows import BlockRows as BlockRows
from sparseattn.ops.bsr.rows import follow_rows as follow_rows
from sparseattn.ops.bsr.rows import make_rows as make_rows
