"""The environment variables that the toolkit reads, with what each does: for every ``--help``, and tlf-doctor."""

from __future__ import annotations

VARIABLES = {
    "TLF_API_KEY": "tlf-serve: the key that clients have to send",
    "TLF_BACKEND": "of every op: triton, cpp or reference instead of the fastest (auto)",
    "TLF_CACHE": "folder of what can be made again: tokens, compiled code, features",
    "TLF_CPU_ALLOCATOR": "torch: keep torch's own allocator while training",
    "TLF_ISA": "of the C++ kernels: baseline, avx2, avx512, avx512bf16 or amx instead of the best",
    "TLF_TOKENS_GIB": "GiB of disk that kept tokens may take; 0: none are kept",
}
