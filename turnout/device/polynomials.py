"""What exp and log are computed with, everywhere: the polynomials of Cephes' expf and logf (www.netlib.org/cephes).

A selection that ranks scores depends on their last bit: the reference and every kernel take the same steps with these.
"""

LOG2_E = 1.44269504088896341
# ln 2 in two parts: products of the first with a small integer are exact.
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
EXP_COEFFICIENTS = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
# exp(x) counts as 0 below the first and as infinite above the second, so that no result, and no reciprocal of one plus
# it, is a subnormal number.
EXP_MIN, EXP_MAX = -87.0, 87.0
LOG_COEFFICIENTS = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
    2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
