"""Attention over parts of the keys, put together by their LSE."""

from sparseattn.ops.merge.api import merge_state as merge_state
from sparseattn.ops.merge.api import merge_state_ as merge_state_
from sparseattn.ops.merge.api import merge_states as merge_states
from sparseattn.ops.merge.api import unsupported_reason as unsupported_reason
