"""How far answers may be from the reference, by the type in which a model computes. Pure.

In: nothing. Out: tolerances. `scripts/lib/tolerances.py` measured the figures below with all-MiniLM-L6-v2 on a CPU: the
worst of the golden texts of up to 400 characters, in batches, against the library's answer for the text alone, in the
same type and in float32.
"""

from legit_worker.validation.comparison import Tolerance

MEASURED = {
    #: Measured: a cosine of 1 - 2e-12 and a difference of 4e-7. Other processors add up in another order.
    "float32": Tolerance(min_cosine=0.9999, max_difference=1e-3),
    #: Measured: 1 - 2.7e-6 and 6e-4.
    "float16": Tolerance(min_cosine=0.9999, max_difference=5e-3),
    #: Measured: 1 - 2.0e-4 and 3.6e-3.
    "bfloat16": Tolerance(min_cosine=0.999, max_difference=2e-2),
}
