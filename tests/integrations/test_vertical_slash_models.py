"""flexprefill and minference in a Transformers model, padded on the left: whole they are dense, sparse they are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import VOCAB, make_model

import sparseattn

FULL: dict[str, dict[str, Any]] = {
    "flexprefill": {"min_budget": 4096, "block_size": 32},
    "minference": {"slash_size": 4096, "block_size": 32},
}
SPARSE: dict[str, dict[str, Any]] = {
    "flexprefill": {"gamma": 0.5, "min_budget": 32, "block_size": 32},
    "minference": {"patterns": [["a_shape", 16, 32], ["vertical_slash", 30, 9]] * 2, "num_local_tokens": 8},
}


@pytest.mark.parametrize("method", list(FULL))
def test_in_a_padded_batch(method: str) -> None:
    sparseattn.register()
    model = make_model("llama", impl="sparseattn_dense")
    ids = torch.randint(3, VOCAB, (2, 200))
    mask = torch.ones_like(ids)
    mask[1, :60] = 0

    def logits(**options: Any) -> tuple[torch.Tensor, list[float]]:
        with torch.no_grad(), sparseattn.record() as calls:
            out = model(ids, attention_mask=mask, sparseattn={"min_seq_len": 1, **options} if options else None).logits
        return out[mask.bool()], [call.density for call in calls]

    dense, _ = logits()
    model.set_attn_implementation(f"sparseattn_{method}")
    whole, densities = logits(**FULL[method])
    assert densities == [1.0, 1.0]
    torch.testing.assert_close(whole, dense)
    sparse, densities = logits(**{**SPARSE[method], "block_size": 32})
    assert all(0 < density < 1 for density in densities)
    assert sparse.isfinite().all()
    assert not torch.allclose(sparse, dense)
