#!/usr/bin/env bash
# safetensors 0.8.0: safetensors.numpy.save_file with arrays that are not in C order.
# Expected: the numbers that were given, as 0.7.0 stores them; or an error, as safetensors.torch raises for a
#   tensor that is not contiguous. The documentation asks for arrays that are "contiguous and dense": a
#   transposed matrix is dense, and contiguous in Fortran order.
# Seen: the memory is written as it lies, under the array's shape. A transposed matrix comes back with its
#   numbers in other places; so does a Fortran-ordered one, such as the components of scikit-learn's PCA or
#   the factors of SciPy's svd; columns cut out of a matrix come back as its first numbers. Shape and type are
#   right; no error, no warning.
# Where it shows: the kernel of one framework transposed for another; the factors U[:, :rank] of a low-rank
#   layer.
# Fails where safetensors behaves otherwise.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
for version in 0.7.0 0.8.0; do
  "$folder/venv/bin/pip" install --quiet "safetensors==$version" numpy
  (cd "$folder" && OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W error - "$version") <<'PYTHON'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

RANK = 2
assert safetensors.__version__ == sys.argv[1]
keeps_numbers = sys.argv[1] == "0.7.0"
weights = np.random.default_rng(0).normal(size=(6, 4))
left, values, right = np.linalg.svd(weights, full_matrices=False)
cases = {
    "C order": weights,
    "transposed": weights.T,
    "Fortran order": np.asfortranarray(weights),
    "factors of a low-rank layer": np.ascontiguousarray(left * values)[:, :RANK],
}
for name, array in cases.items():
    save_file({"weight": array}, "weights.safetensors")
    restored = load_file("weights.safetensors")["weight"]
    assert restored.shape == array.shape and restored.dtype == array.dtype, "another shape or type"
    same = np.array_equal(restored, array)
    as_it_lies = array.T if array.flags.f_contiguous else array.base
    moved = np.array_equal(restored.ravel(), np.ravel(as_it_lies)[: array.size])
    print(f"safetensors {safetensors.__version__}, {name}: {'the same' if same else 'other'} numbers")
    assert same == (keeps_numbers or array.flags.c_contiguous), "changed"
    assert same or moved, "not the memory as it lies"
PYTHON
done
echo "as described"
