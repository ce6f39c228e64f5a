"""Helpers of the compression notebooks; see DESIGN in the README for the floors they stand on."""

import os

if "NNC_MODULES" in os.environ:  # a run wants to know which modules its processes load
    from nnc_utils import provenance

    provenance.watch(os.environ["NNC_MODULES"])
