"""Share of the GEMM peak, and memory, of a step: three models, full, with LoRA and with QLoRA; random weights."""

from __future__ import annotations

from tinyllava_fast.bench.gpu_job import STEPS, Job
from tinyllava_fast.bench.gpu_steps.train import alone
from tinyllava_fast.bench.gpu_workload import PHI, SMALL, TINYLLAMA, write_workload
from tinyllava_fast.bench.settings import TrainSettings

ROWS = {
    "SmolLM2-135M + SigLIP-B, full": (SMALL, "finetune", 16),
    "TinyLlama-1.1B + SigLIP-so400m, full": (TINYLLAMA, "finetune", 8),
    "Phi-2 + SigLIP-so400m, LoRA 128": (PHI, "lora", 8),
    "Phi-2 + SigLIP-so400m, QLoRA 128": (PHI, "qlora", 8),
}
"""Models, mode of `tlf-bench train`, samples a step."""
ITEM_S = 45


@STEPS.register("mfu")
def run(job: Job) -> None:
    """Train each a few steps, compiled by layers on a GPU."""

    def one(name: str) -> None:
        model, mode, samples = ROWS[name]
        config = write_workload(job.scratch, model, device=job.device, tiny=job.tiny)
        settings = TrainSettings(mode=mode, samples=samples, rounds=4, steps=2, warmup=2)
        keys = ["engine.compile=regional"]
        if job.tiny:
            settings, keys = TrainSettings(mode=mode, samples=1, rounds=1, warmup=1, lora_rank=2), []
        alone(job, name, config, keys, settings)

    job.each(list(ROWS)[1::2] if job.tiny else ROWS, ITEM_S, one)
