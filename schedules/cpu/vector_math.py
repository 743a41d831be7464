"""exp, log, pow, tanh, erf and sigmoid of float32 as arithmetic that LLVM can put into vector registers.

LLVM has no vector form of these functions: a vectorised loop would call the scalar library once an element. Each is
rewritten to a polynomial or rational function of one variable; the error is about two units in the last place (tanh,
erf: four), which tests/test_schedules_math.py measures. Coefficients: exp and log from Cephes (S. Moshier, `expf.c`,
`logf.c`), tanh and erf from Eigen (`generic_fast_tanh_float`, the rational erf that it took from TensorFlow).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm_ffi
from tvm.ir import Call
from tvm.tirx import Cast, FloatImm, IntImm, Let, PrimFunc, Select, Var, reinterpret, sqrt

# Adding 1.5 * 2^23 rounds a float32 to an integer and leaves that integer in the low bits of the sum.
_MAGIC, _MAGIC_BITS = 12582912.0, 0x4B400000
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_TANH_P = (
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928875436e-04,
    4.89352455891786e-03,
)
_TANH_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
_ERF_P = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_ERF_Q = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)
# Integer powers up to this one are a few multiplications, each within half a unit of the last place.
_LARGEST_POWER = 8

HEAVY_CALLS = frozenset(
    f"tirx.{name}"
    for name in ("exp", "exp2", "exp10", "log", "log2", "log10", "log1p", "pow", "tanh", "erf", "sigmoid", "sin", "cos")
)


def op_name(call: Call) -> str:
    """The name of what a call calls, with today's dialect prefix replaced by `tirx.`."""
    name = str(getattr(call.op, "name", ""))
    return "tirx." + name.split(".", 1)[1] if "." in name else name


def rewrite_math(func: PrimFunc) -> PrimFunc:
    """The same function with float32 exp, log, pow, tanh, erf and sigmoid written out as arithmetic."""

    def rewrite(call: Call) -> Any:
        if str(call.ty) != "float32" and str(getattr(call.ty, "dtype", "")) != "float32":
            return call
        name, args = op_name(call), list(call.args)
        if name == "tirx.pow":
            return power(args[0], args[1], call)
        if name in _REWRITES:
            return _let(args[0], _REWRITES[name])
        return call

    return func.with_body(tvm_ffi.structural_map(func.body, (Call, rewrite), order="post"))


def _f(value: float) -> FloatImm:
    return FloatImm("float32", value)


def _i(value: int) -> IntImm:
    return IntImm("int32", value)


def _let(value: Any, body: Callable[[Any], Any]) -> Any:
    """`body(value)` with the value computed once."""
    if isinstance(value, (Var, FloatImm)):
        return body(value)
    var = Var("t", "float32" if "float32" in str(value.ty) else "int32")
    return Let(var, value, body(var))


def _horner(x: Any, coefficients: Sequence[float]) -> Any:
    """The polynomial with the given coefficients, highest power first."""
    result: Any = _f(coefficients[0])
    for coefficient in coefficients[1:]:
        result = result * x + _f(coefficient)
    return result


def _two_to(k: Any) -> Any:
    """2^k of an int32 in [-126, 127], exactly, by its exponent bits."""
    return reinterpret("float32", (k + _i(127)) << _i(23))


def exp(x: Any) -> Any:
    """e^x: 2^k e^r with k = round(x / ln 2) and |r| <= ln 2 / 2. Overflows to inf, underflows to 0, keeps NaN."""

    def finish(z: Any, x: Any) -> Any:
        n = z - _f(_MAGIC)
        k = reinterpret("int32", z) - _i(_MAGIC_BITS)

        def scale(p: Any, k: Any) -> Any:
            # In two steps, so that neither factor leaves the normal numbers.
            return p * _two_to(k >> _i(1)) * _two_to(k - (k >> _i(1)))

        def reduced(r: Any) -> Any:
            return _let(k, lambda k: scale(_horner(r, _EXP) * r * r + r + _f(1.0), k))

        return _let(n, lambda n: _let(x - n * _f(_LN2_HIGH) - n * _f(_LN2_LOW), reduced))

    # Select and not min/max: a NaN fails both comparisons and stays.
    clamped = Select(x > _f(89.0), _f(89.0), Select(x < _f(-104.0), _f(-104.0), x))
    return _let(clamped, lambda x: _let(x * _f(1.44269504088896341) + _f(_MAGIC), lambda z: finish(z, x)))


def log(x: Any) -> Any:
    """ln x by exponent and mantissa in [sqrt(1/2), sqrt 2); ln 0 = -inf, NaN below 0, inf and NaN stay."""

    def finish(m: Any, e: Any) -> Any:
        y = _horner(m, _LOG) * m * m * m + e * _f(_LN2_LOW) - _f(0.5) * m * m
        return y + m + e * _f(_LN2_HIGH)

    def split(bits: Any, extra: Any) -> Any:
        # Offset by the bits of sqrt(1/2), so that the exponent counts from there.
        shifted = bits - _i(0x3F3504F3)
        exponent = shifted >> _i(23)
        mantissa = reinterpret("float32", bits - (exponent << _i(23))) - _f(1.0)
        return _let(Cast("float32", exponent) + extra, lambda e: _let(mantissa, lambda m: finish(m, e)))

    small = x < _f(1.17549435e-38)
    normal = Select(small, x * _f(8388608.0), x)
    extra = Select(small, _f(-23.0), _f(0.0))
    finite = _let(reinterpret("int32", normal), lambda bits: split(bits, extra))
    infinity, lowest, nan = _f(float("inf")), _f(float("-inf")), _f(float("nan"))
    return Select(x > _f(0.0), Select(x < infinity, finite, x), Select(x == _f(0.0), lowest, nan))


def tanh(x: Any) -> Any:
    """tanh x: x P(x^2) / Q(x^2), clamped where the result rounds to one."""
    bound = 7.99881172180175781
    inside = _let(
        Select(x > _f(bound), _f(bound), Select(x < _f(-bound), _f(-bound), x)),
        lambda c: _let(c * c, lambda q: c * _horner(q, _TANH_P) / _horner(q, _TANH_Q)),
    )
    tiny = (x < _f(0.0004)).astype("bool") & (x > _f(-0.0004))
    return Select(tiny, x, inside)


def erf(x: Any) -> Any:
    """erf x: x P(x^2) / Q(x^2), clamped to |x| <= 4 where the result rounds to one."""
    return _let(
        Select(x > _f(4.0), _f(4.0), Select(x < _f(-4.0), _f(-4.0), x)),
        lambda c: _let(c * c, lambda q: c * _horner(q, _ERF_P) / _horner(q, _ERF_Q)),
    )


def sigmoid(x: Any) -> Any:
    """1 / (1 + e^-x)."""
    return _f(1.0) / (_f(1.0) + exp(_f(0.0) - x))


def power(x: Any, exponent: Any, call: Any) -> Any:
    """x^exponent for a constant exponent: multiplications and square roots where it is a small multiple of 1/4, else
    exp(exponent ln x) for a base above zero. `call` comes back where neither fits (a variable exponent)."""
    if not isinstance(exponent, FloatImm):
        return call
    c = float(exponent.value)
    if c == 0.0:
        return _f(1.0)
    if float(c * 4).is_integer() and abs(c) <= _LARGEST_POWER:
        quarters = int(abs(c) * 4)
        result = lambda x: _quarter_power(x, quarters)  # noqa: E731
        return _let(x, result if c > 0 else lambda x: _f(1.0) / result(x))
    if c.is_integer():
        return call  # a large whole power of a negative base has a sign
    zero, infinite = (_f(0.0), _f(float("inf"))) if c > 0 else (_f(float("inf")), _f(0.0))

    def general(x: Any) -> Any:
        inside = _let(_let(x, log) * _f(c), exp)
        positive = Select(x < _f(float("inf")), inside, infinite)
        return Select(x > _f(0.0), positive, Select(x == _f(0.0), zero, _f(float("nan"))))

    return _let(x, general)


def _quarter_power(x: Any, quarters: int) -> Any:
    """x^(quarters / 4) from whole powers, the square root and its square root."""
    factors = []
    whole, rest = divmod(quarters, 4)
    if whole:
        factors.append(_whole_power(x, whole))
    if rest >= 2:
        factors.append(sqrt(x))
    if rest % 2:
        factors.append(sqrt(sqrt(x)))
    product = factors[0]
    for factor in factors[1:]:
        product = product * factor
    return product


def _whole_power(x: Any, n: int) -> Any:
    if n == 1:
        return x
    half = _whole_power(x, n // 2)
    return half * half * x if n % 2 else half * half


_REWRITES: dict[str, Callable[[Any], Any]] = {
    "tirx.exp": exp,
    "tirx.log": log,
    "tirx.tanh": tanh,
    "tirx.erf": erf,
    "tirx.sigmoid": sigmoid,
}
