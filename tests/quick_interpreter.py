"""Takes out of Triton's interpreter what costs more than the kernels and changes nothing here."""

from __future__ import annotations

import functools
import types
from typing import Any


def quicken() -> None:
    """Change the interpreter of this process, where Triton is installed.

    The interpreter replaces its language at every launch and again at every call of a device function; nothing in a
    process that interprets compiles, so once is enough. It works out whether integers overflow and, unless it debugs,
    drops the answer. It builds its table of dtypes at every look, and of every tensor the shape in three forms.
    """
    try:
        import triton.experimental.gluon.language  # noqa: F401  takes over parts of the language before the change
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    patch, done = interpreter._patch_lang, []

    def patch_once(_: object) -> object:
        if not done:
            done.append(patch(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})))
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    look = functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda dtype: look(tl.uint64 if dtype.scalar.is_ptr() else dtype.scalar)
    _remember_shapes(tl.block_type, tl.tensor)


def _remember_shapes(block_type: Any, tensor: Any) -> None:
    """Types and tensors of a shape that was there before share what follows from the shape alone."""
    new_type, new_tensor = block_type.__init__, tensor.__init__
    of_types: dict[tuple[int, ...], dict[str, Any]] = {}
    of_tensors: dict[tuple[int, ...], dict[str, Any]] = {}

    def set_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = tuple([getattr(n, "value", n) for n in shape])
        if key not in of_types:
            new_type(self, element_ty, shape)
            of_types[key] = {name: value for name, value in vars(self).items() if name not in ("element_ty", "name")}
            of_types[key]["text"] = str(self.shape)
        vars(self).update(of_types[key], element_ty=element_ty)
        self.name = f"<{self.text}, {element_ty}>"

    def set_tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in of_tensors:
            new_tensor(self, handle, type)
            of_tensors[key] = {"shape": self.shape, "numel": self.numel}
        vars(self).update(of_tensors[key], handle=handle, type=type, dtype=type.scalar)

    block_type.__init__, tensor.__init__ = set_type, set_tensor
