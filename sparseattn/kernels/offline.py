"""Kernels as Triton's compiler takes them, without a GPU and without tensors: see ``tests/compile``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget

Offline = tuple[Any, dict[str, Any], dict[Any, Any], dict[Any, Any]]


def offline_case(
    kernel: Any, constants: dict[str, Any], types: dict[str, Any] | None = None, pointers: str = "*i32"
) -> Offline:
    """A kernel, its signature, constexprs and attributes: integers, and pointers of 16 bytes' alignment.

    Args:
        kernel: Its pointers are called ``..._ptr``.
        constants: Values of its constexprs, and of others.
        types: Of arguments that are neither int32 nor ``pointers``.
        pointers: What the other pointers point to.
    """
    given = types or {}
    signature: dict[str, Any] = {}
    constexprs: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for i, param in enumerate(kernel.params):
        is_pointer = param.name.endswith("_ptr")
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            constexprs[(i,)] = constants[param.name]
        else:
            signature[param.name] = given.get(param.name, pointers if is_pointer else "i32")
        if is_pointer and not param.do_not_specialize_on_alignment:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return kernel, signature, constexprs, attributes


class HopperDriver:
    """What Triton asks its driver for before it launches, for a Hopper GPU that need not be there."""

    def get_current_target(self) -> GPUTarget:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0
