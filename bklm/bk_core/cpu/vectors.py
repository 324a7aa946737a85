"""Vector registers as numbers of numba: + - * / on all lanes at once, loads, stores and masks.

LLVM turns a loop over lanes into vector instructions only where it can prove that nothing overlaps, then takes half
registers on most AVX-512 processors, and spends most of the compilation on it. Here a kernel names the vectors itself; LLVM
splits them where a processor's registers are shorter, so the same code is right on every processor.

Products and sums may be contracted to fused multiply-adds; nothing else of IEEE 754 is given up. Addresses are plain
integers until :func:`pointer` gives them the element type of an array.
"""

from __future__ import annotations

import operator

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import config
from numba.core.imputils import lower_builtin
from numba.core.typing import signature
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import intrinsic, models, register_model


def _register_bytes() -> int:
    """Of the processor that numba compiles for: NUMBA_CPU_NAME's, else this one."""
    if config.CPU_NAME:
        return 64 if "+avx512f" in (config.CPU_FEATURES or "") else 32
    return 64 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 32


REGISTER_BYTES = _register_bytes()


class Vector(types.Type):
    """A register full of numbers of one floating-point type."""

    def __init__(self, dtype):
        self.dtype = dtype
        self.lanes = REGISTER_BYTES * 8 // dtype.bitwidth
        super().__init__(name=f"Vector({dtype}, {self.lanes})")


class Mask(types.Type):
    """A truth value for each lane."""

    def __init__(self, lanes):
        self.lanes = lanes
        super().__init__(name=f"Mask({lanes})")


def _element(dtype):
    return ir.FloatType() if dtype.bitwidth == 32 else ir.DoubleType()


def _ir_vector(vector):
    return ir.VectorType(_element(vector.dtype), vector.lanes)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, _ir_vector(vector))


@register_model(Mask)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager, mask):
        super().__init__(manager, mask, ir.VectorType(ir.IntType(1), mask.lanes))


def _arithmetic(function, instruction):
    @infer_global(function)
    class _Typing(AbstractTemplate):
        def generic(self, args, kws):
            if len(args) == 2 and isinstance(args[0], Vector) and args[0] == args[1]:
                return signature(args[0], *args)
            return None

    @lower_builtin(function, Vector, Vector)
    def _lower(context, builder, signature, args):
        return getattr(builder, instruction)(*args, flags=("contract",))


_arithmetic(operator.add, "fadd")
_arithmetic(operator.sub, "fsub")
_arithmetic(operator.mul, "fmul")
_arithmetic(operator.truediv, "fdiv")


@infer_global(operator.neg)
class _NegativeTyping(AbstractTemplate):
    def generic(self, args, kws):
        return signature(args[0], args[0]) if isinstance(args[0], Vector) else None


@lower_builtin(operator.neg, Vector)
def _negative(context, builder, signature, args):
    return builder.fneg(args[0])


@infer_global(operator.or_)
class _EitherTyping(AbstractTemplate):
    def generic(self, args, kws):
        if len(args) == 2 and isinstance(args[0], Mask) and args[0] == args[1]:
            return signature(args[0], *args)
        return None


@lower_builtin(operator.or_, Mask, Mask)
def _either(context, builder, signature, args):
    return builder.or_(*args)


def _constant(vector, value):
    return ir.Constant(_ir_vector(vector), [float(value)] * vector.lanes)


def _spread(builder, vector, value):
    one = builder.insert_element(ir.Constant(_ir_vector(vector), ir.Undefined), value, ir.IntType(32)(0))
    order = ir.Constant(ir.VectorType(ir.IntType(32), vector.lanes), [0] * vector.lanes)
    return builder.shuffle_vector(one, one, order)


def _at(builder, pointer, index, vector):
    place = builder.gep(pointer, [index])
    return builder.bitcast(place, _ir_vector(vector).as_pointer())


def ir_load(builder, pointer, index, vector):
    return builder.load(_at(builder, pointer, index, vector), align=vector.dtype.bitwidth // 8)


def ir_store(builder, value, pointer, index, vector):
    builder.store(value, _at(builder, pointer, index, vector), align=vector.dtype.bitwidth // 8)


@intrinsic
def apart(typingctx):
    """Keeps the function that calls it one function: inlined, it would be compiled again in every place."""

    def codegen(context, builder, signature, args):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.none(), codegen


@intrinsic
def pointer(typingctx, address, like):
    """An integer address as a pointer to the element type of the array ``like``."""
    kind = types.CPointer(like.dtype)

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(kind))

    return kind(address, like), codegen


@intrinsic
def integers(typingctx, address):
    """An address as a pointer to 64-bit integers."""
    kind = types.CPointer(types.int64)

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(kind))

    return kind(address), codegen


@intrinsic
def lanes_of(typingctx, p):
    """Numbers in a vector of what ``p`` points to."""
    lanes = Vector(p.dtype).lanes

    def codegen(context, builder, signature, args):
        return context.get_constant(types.intp, lanes)

    return types.intp(p), codegen


@intrinsic
def load(typingctx, p, index):
    """The vector at p[index]."""
    vector = Vector(p.dtype)

    def codegen(context, builder, signature, args):
        return ir_load(builder, *args, vector)

    return vector(p, types.intp), codegen


@intrinsic
def store(typingctx, p, index, value):
    """Write a vector to p[index], ..."""

    def codegen(context, builder, signature, args):
        ir_store(builder, args[2], args[0], args[1], value)
        return context.get_dummy_value()

    return types.none(p, types.intp, value), codegen


@intrinsic
def splat(typingctx, p, value):
    """A number in every lane, of the type that ``p`` points to."""
    vector = Vector(p.dtype)

    def codegen(context, builder, signature, args):
        return _spread(builder, vector, args[1])

    return vector(p, p.dtype), codegen


@intrinsic
def nowhere(typingctx, p):
    """A mask of no lane."""
    mask = Mask(Vector(p.dtype).lanes)

    def codegen(context, builder, signature, args):
        return ir.Constant(context.get_value_type(mask), [0] * mask.lanes)

    return mask(p), codegen


@intrinsic
def any_of(typingctx, mask):
    """Whether the mask holds any lane."""

    def codegen(context, builder, signature, args):
        bits = builder.bitcast(args[0], ir.IntType(mask.lanes))
        return builder.icmp_unsigned("!=", bits, bits.type(0))

    return types.boolean(mask), codegen


# Squares of moduli inside this range come from numbers that can be squared, and whose reciprocals can, with room to spare.
_RANGE = {32: (120, 127, 23), 64: (1000, 1023, 52)}


@intrinsic
def outside(typingctx, square):
    """Where a square of a modulus is NaN, or not between 2^-120 and 2^120 (2^-1000 and 2^1000)."""
    mask = Mask(square.lanes)
    power, bias, shift = _RANGE[square.dtype.bitwidth]

    def codegen(context, builder, signature, args):
        whole = ir.VectorType(ir.IntType(square.dtype.bitwidth), square.lanes)
        # Numbers that are not negative have the order of their bits.
        bits = builder.bitcast(args[0], whole)
        least = ir.Constant(whole, [(bias - power) << shift] * square.lanes)
        width = ir.Constant(whole, [(2 * power) << shift] * square.lanes)
        return builder.icmp_unsigned(">", builder.sub(bits, least), width)

    return mask(square), codegen


@intrinsic
def power_for(typingctx, re, im):
    """A power of two that brings max(|re|, |im|) where it can be squared; 1 where it can."""
    power = {32: 60, 64: 500}[re.dtype.bitwidth]
    far = {32: 66, 64: 530}[re.dtype.bitwidth]

    def codegen(context, builder, signature, args):
        nil = _constant(re, 0)
        sizes = [_magnitude(builder, x, nil) for x in args]
        size = builder.select(builder.fcmp_ordered(">", *sizes), *sizes)
        large = builder.fcmp_ordered(">", size, _constant(re, 2.0**power))
        small = builder.fcmp_ordered("<", size, _constant(re, 2.0**-power))
        unless_large = builder.select(small, _constant(re, 2.0**far), _constant(re, 1.0))
        return builder.select(large, _constant(re, 2.0**-far), unless_large)

    return re(re, im), codegen


@intrinsic
def kept(typingctx, re, im):
    """Complex numbers, 0 for those below 2^-100 (2^-900): denormal numbers take a hundred times as long."""
    least = {32: 2.0**-100, 64: 2.0**-900}[re.dtype.bitwidth]
    both = types.UniTuple(re, 2)

    def codegen(context, builder, signature, args):
        nil = _constant(re, 0)
        sizes = [_magnitude(builder, x, nil) for x in args]
        small = builder.fcmp_ordered("<", builder.fadd(*sizes), _constant(re, least))
        return context.make_tuple(builder, both, [builder.select(small, nil, x) for x in args])

    return both(re, im), codegen


def _magnitude(builder, x, nil):
    return builder.select(builder.fcmp_ordered("<", x, nil), builder.fneg(x), x)
