"""Dense attention by SparseAttn's name, with any mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparseattn.errors import argument_error
from sparseattn.src.utils import attend, token_major


def Full_prefill(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    causal: bool = True,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Attend every visible key: by this library's operator, or with a mask by torch's.

    Args:
        query_states: ``[B, Hq, Sq, D]`` in float16, bfloat16 or float32.
        key_states: ``[B, Hkv, Sk, D]``; Hq heads, or fewer that divide it (repeated where there is a mask).
        value_states: ``[B, Hkv, Sk, Dv]``.
        causal: Query i sees keys ``j <= i + Sk - Sq``; with a mask, both must let it.
        attention_mask: ``[Sq, Sk]`` or ``[B, Hq, Sq, Sk]``, each dimension of the latter also 1. Of bools, True is
            *keep*. Of floats, it is added to the scaled scores; -inf and the dtype's lowest number (as Transformers
            writes it) hide the key. For padding ``[B, Sk]``, pass ``padding[:, None, None, :].bool()``.

    Returns:
        ``[B, Hq, Sq, Dv]`` in query_states' dtype; 0 for queries that see no key.

    Raises:
        TypeError: No tensors, or dtypes that differ; a mask that is neither of bools nor of floats.
        ValueError: Shapes that do not fit.
    """
    if attention_mask is None:
        return attend({"method": "dense"}, query_states, key_states, value_states, causal)
    q, k, v = (x.transpose(1, 2) for x in token_major(query_states, key_states, value_states))
    visible, bias = _split(attention_mask, q, k)
    if causal:
        sq, sk = q.shape[2], k.shape[2]
        visible = visible & torch.ones(sq, sk, dtype=torch.bool, device=q.device).tril(sk - sq)
    # A row that sees nothing would be 0 / 0: it attends everything here, and is set to zero afterwards.
    some = visible.any(-1, keepdim=True)
    allowed = visible | ~some
    if bias is not None:
        allowed = torch.where(allowed, torch.where(some, bias, 0.0), -torch.inf)
    # torch's memory-efficient kernel takes masks but no groups, and K and V repeated are small beside a mask.
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    return torch.where(some, out, 0.0)


def _split(mask: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
    """A mask as what it shows, bool, and what it adds there, both of four dimensions."""
    if not isinstance(mask, Tensor):
        raise argument_error("attention_mask", "a tensor, or None", type(mask).__name__, kind=TypeError)
    full = (*q.shape[:3], k.shape[2])
    fits = mask.dim() == 4 and all(m in (1, n) for m, n in zip(mask.shape, full, strict=True))
    if tuple(mask.shape) != full[2:] and not fits:
        expected = f"shape {list(full[2:])} or {list(full)}, each dimension of the latter also 1"
        hint = "Padding [batch, tokens] goes in as padding[:, None, None, :].bool()."
        raise argument_error("attention_mask", expected, list(mask.shape), hint)
    if mask.device != q.device:
        raise argument_error("attention_mask", f"device {q.device} like query_states", mask.device)
    mask = mask if mask.dim() == 4 else mask[None, None]
    if mask.dtype == torch.bool:
        return mask, None
    if not mask.is_floating_point():
        hint = "Bools mean keep, floats are added to the scores; integers could mean either."
        raise argument_error("attention_mask", "bools or floats", mask.dtype, hint, kind=TypeError)
    # Half the lowest number is still no bias that anybody means. A mask of another dtype hides by its own lowest
    # number, and what overflows in the dtype of the scores would make a row of it 0 / 0.
    visible = mask > torch.finfo(mask.dtype).min / 2
    mask = mask.to(q.dtype)
    return visible & (mask > torch.finfo(q.dtype).min / 2), mask
