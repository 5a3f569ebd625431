"""Launch settings shared by the Triton kernels: block sizes by (architecture, size), as a table of measured numbers.

There are no Triton kernels yet. Those of ``tinyllava_fast/ops/<file>.py`` go to ``kernels/<file>.py``: a launcher named
like each op (``splice_fwd``, ``splice_bwd``) that takes and returns what the torch reference does, with no autograd, no
fallback and no policy. ``define_op`` finds it by name and uses it for CUDA tensors; tests/ops/test_every_op.py compares
it with the reference on every sample. No ``@triton.autotune``: it stalls the first call, and ranks may disagree.
"""
