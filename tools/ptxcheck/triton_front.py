"""Triton kernels -> PTX -> launchable objects."""

from __future__ import annotations

import numpy as np

from .errors import CompileError
from .module import Module
from .tensormap import SPAN, TensorMap

# element types in the metadata of descriptors, numbered as on the device
_ELEMENTS = {
    0: "uint8",
    1: "uint16",
    2: "uint32",
    3: "int32",
    4: "uint64",
    5: "int64",
    6: "float16",
    7: "float32",
    8: "float32_ftz",
    9: "float64",
    10: "bfloat16",
}


def is_descriptor(x):
    """A TensorDescriptor of Triton or of Gluon."""
    return type(x).__name__ == "TensorDescriptor" and hasattr(x, "block_shape")


def descriptor_parts(desc, meta, memory):
    """What Triton's launcher passes for a tensor descriptor: a tensor map, then the shape and
    the strides; below sm_90 (no meta) the tensor takes the place of the map."""
    place = [*map(int, desc.shape), *map(int, desc.strides)]
    if meta is None:
        return [desc.base, *place, desc.padding == "nan", desc.round_f32_to_tf32, *place]
    element = "tfloat32" if desc.round_f32_to_tf32 else _ELEMENTS[meta["elem_type"]]
    size = meta["elem_size"]
    tm = TensorMap(
        memory.address_of(desc.base),
        element,
        desc.shape[::-1],
        [s * size for s in desc.strides[-2::-1]],
        meta["block_size"][::-1],
        swizzle=SPAN[meta["swizzle"]] if meta["swizzle"] else 0,
        nan_fill=desc.padding == "nan",
    )
    return [tm, *place]


class TritonKernel:
    """A compiled @triton.jit function that runs in the interpreter."""

    def __init__(self, compiled, arg_names, constexprs, memory=None):
        self.compiled = compiled
        self.ptx = compiled.asm["ptx"]
        self.metadata = compiled.metadata
        self.module = Module(self.ptx, memory)
        self.name = next(iter(self.module.kernels))
        self.arg_names = arg_names  # runtime arguments, in order
        self.constexprs = constexprs
        self.num_warps = compiled.metadata.num_warps
        self.shared = compiled.metadata.shared

    @property
    def block(self):
        req = self.module.kernel(self.name).fn.reqntid
        return tuple(req) if req else (32 * self.num_warps, 1, 1)

    def __call__(self, grid, *args, **options):
        """Launch over `grid` with the runtime (non-constexpr) arguments.

        Arguments the compiler specialized away (value 1) are passed like the
        others; hidden scratch parameters are filled in."""
        kern = self.module.kernel(self.name)
        if len(args) != len(self.arg_names):
            raise CompileError(
                f"{self.name} takes {len(self.arg_names)} runtime arguments "
                f"({', '.join(self.arg_names)}), got {len(args)}"
            )
        memory = self.module.memory
        before = {id(b) for b in memory.buffers}
        metas = iter(getattr(self.metadata, "tensordesc_meta", None) or [])
        full = []
        for a in args:
            full += descriptor_parts(a, next(metas, None), memory) if is_descriptor(a) else [a]
        hidden = len(kern.params) - len(full)
        if hidden < 0:
            raise CompileError(
                f"{self.name}: {len(kern.params)} PTX parameters for {len(full)} arguments"
            )
        meta = self.metadata
        ctas = getattr(meta, "num_ctas", 1)
        if ctas > 1:  # as Triton's launcher does
            grid = (grid,) if isinstance(grid, int) else tuple(grid)
            grid = (grid[0] * ctas, *grid[1:])
        n = grid if isinstance(grid, int) else int(np.prod(grid))
        sizes = [getattr(meta, "global_scratch_size", 0), getattr(meta, "profile_scratch_size", 0)]
        for k in range(hidden):
            size = sizes[k] if k < len(sizes) else 0
            full.append(np.zeros(size * n, np.uint8) if size else 0)
        try:
            return self.module.launch(
                self.name, grid, self.block, full, dynamic_smem=self.shared, **options
            )
        finally:
            if not options.get("keep"):
                for b in [b for b in memory.buffers if id(b) not in before]:
                    if b.owner is not None:
                        memory.release(b.owner)


def triton_compile(
    fn,
    signature,
    constexprs=None,
    attrs=None,
    arch=86,
    num_warps=4,
    num_stages=3,
    memory=None,
    **options,
):
    """Compile a @triton.jit or @gluon.jit function ahead of time (no GPU needed).

    signature   {argument: '*bf16' | 'i32' | 'fp32' | 'constexpr' | 'tensordesc<bf16[64,32]>'
                ...}; Gluon's descriptors name their layout: `gluon_descriptor`
    constexprs  {argument name or index tuple: value}
    attrs       e.g. {(0,): [['tt.divisibility', 16]]}, or a list of argument
                names that are divisible by 16
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(fn.arg_names)
    consts = {}
    for k, v in (constexprs or {}).items():
        if isinstance(k, str):
            k = (names.index(k),)
        elif isinstance(k, int):
            k = (k,)
        consts[k] = v
    sig = {n: signature.get(n, "constexpr" if (names.index(n),) in consts else None) for n in names}
    missing = [n for n, t in sig.items() if t is None]
    if missing:
        raise CompileError(f"no type given for {', '.join(missing)}")
    for k in consts:
        if len(k) == 1:
            sig[names[k[0]]] = "constexpr"
    if attrs is not None and not isinstance(attrs, dict):
        attrs = {
            (names.index(a) if isinstance(a, str) else a,): [["tt.divisibility", 16]] for a in attrs
        }
    if getattr(fn, "is_gluon", lambda: False)():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    src = ASTSource(fn=fn, signature=sig, constexprs=consts, attrs=attrs or {})
    compiled = triton.compile(
        src,
        target=GPUTarget("cuda", arch, 32),
        options=dict(num_warps=num_warps, num_stages=num_stages, **options),
    )
    runtime = [n for n in names if sig[n] != "constexpr"]
    return TritonKernel(compiled, runtime, consts, memory)


def gluon_descriptor(element, block_shape, layout=None):
    """Signature of a Gluon tensor descriptor argument, e.g. ("bf16", [128, 64])."""
    if layout is None:
        from triton.experimental.gluon import language as gl

        types = {"bf16": gl.bfloat16, "fp16": gl.float16, "fp32": gl.float32}
        layout = gl.NVMMASharedLayout.get_default_for(list(block_shape), types[element])
    return f"tensordesc<{element}[{','.join(map(str, block_shape))}],{layout!r}>"
