"""``import sparseattn.hf`` makes this library's attention available to Hugging Face Transformers by name."""

from sparseattn.integrations.options import AttentionOptions as AttentionOptions
from sparseattn.integrations.options import options as options
from sparseattn.integrations.records import CallRecord as CallRecord
from sparseattn.integrations.records import record as record
from sparseattn.integrations.transformers import register as register

register()
