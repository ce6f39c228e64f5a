#!/usr/bin/env bash
# h5py 3.16.0 (HDF5 2.0.0): create_dataset(scaleoffset=...), "for integer data the number of bits to retain",
# "for floating point data the number of digits after the decimal place".
# Expected: scaleoffset=4 keeps 16 neighbouring integers, the codes -8 to 7 of 4-bit weights. With 3 digits
#   the error is "less than 0.5*10**(-scaleoffset)", as h5py's documentation says.
# Seen: the largest code is read back as 0: 7 becomes 0, the other 15 are right; so with each number of bits
#   from 2 to 7. The filter keeps the code of all ones for the fill value, 0 where none is given, and does not
#   check that it is free. Codes 0 to 15 come back whole, as 0 is the fill value itself; so do -8 to 7 with
#   fillvalue=-8, in the same bytes, or with 5 bits. Floats that are nearer to the fill value than the last
#   digit become it: with 3 digits 0.00099 is read as 0, twice the error that is promised, and right with
#   another fill value. No error, no warning.
# Where it shows: quantized weights in HDF5 files: the largest ones are pruned, and of float weights more
#   small ones than rounding removes.
# Fails where h5py behaves otherwise.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet h5py==3.16.0 numpy
cd "$folder" && "$folder/venv/bin/python" -W error - <<'PYTHON'
import h5py
import numpy as np


def stored(array, bits_or_digits, fill_value=None):
    """The array out of the file, and the bytes that it takes there."""
    with h5py.File("weights.h5", "w") as file:
        options = {"scaleoffset": bits_or_digits, "fillvalue": fill_value}
        file.create_dataset("codes", data=array, chunks=array.shape, **options)
    with h5py.File("weights.h5") as file:
        return file["codes"][()], file["codes"].id.get_storage_size()


print("h5py", h5py.__version__, "HDF5", h5py.version.hdf5_version)
for bits in range(2, 8):
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = np.repeat(np.arange(lowest, highest + 1, dtype=np.int8), 64)
    restored, size = stored(codes, bits)
    lost, become = np.unique(codes[codes != restored]), np.unique(restored[codes != restored])
    print(f"{bits} bits, {lowest} to {highest}: {lost.tolist()} becomes {become.tolist()}; {size} bytes")
    assert lost.tolist() == [highest] and become.tolist() == [0], "other codes are lost than was seen"
    right, same_size = stored(codes, bits, fill_value=lowest)
    assert np.array_equal(right, codes) and same_size == size, "lost with another fill value, too"
    assert np.array_equal(stored(codes, bits + 1)[0], codes), "lost with one bit more, too"
    assert np.array_equal(stored(codes - lowest, bits)[0], codes - lowest), "lost without a sign, too"

weights = np.random.default_rng(0).normal(scale=0.01, size=10_000)
for digits in (2, 3):
    unit = 10.0**-digits
    restored, _ = stored(weights, digits)
    error, near_zero = np.abs(restored - weights), np.abs(weights) < unit
    worst = error.max() / unit
    print(f"{digits} digits: error up to {worst:.2f} units of {unit}, {near_zero.mean():.0%} become 0")
    assert error.max() > 0.95 * unit, "as good as promised now"
    assert np.all(restored[near_zero] == 0) and error[~near_zero].max() < 0.51 * unit, "not what is near 0"
    right, _ = stored(weights, digits, fill_value=1.0)
    assert np.abs(right - weights).max() < 0.51 * unit, "not for the fill value's sake"
print("as described")
PYTHON
