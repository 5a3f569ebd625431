"""The workloads of `tlf-bench gpu`: models of plan.yaml with random weights, fed with easy-VQA; no network needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from tinyllava_fast.bench import cluster
from tinyllava_fast.bench.samples import write_easy_vqa
from tinyllava_fast.bench.settings import SMOLLM2
from tinyllava_fast.data.bpe import texts_of, train_tokenizer

SMALL, TINYLLAMA, PHI = (
    ("smollm2_135m", "siglip_b16_224"),
    ("tinyllama_1_1b", "siglip_so400m_384"),
    ("phi_2", "siglip_so400m_384"),
)
"""Language model and tower, as plan.yaml names them."""
POSITIONS = 4096
VOCABULARY = 512
TINY = {
    "llm": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": VOCABULARY + 32},
    "vision": {"image_size": 32, "patch_size": 16, "hidden_size": 32, "intermediate_size": 64}
    | {"num_hidden_layers": 2, "num_attention_heads": 2},
}
"""Sizes of a dry run's models."""


def write_workload(folder: Path, model: tuple[str, str], *, device: str, tiny: bool) -> Path:
    """Write the YAML of a workload, and its tokenizer, into a folder that is there; returns the YAML's path.

    model: one of those above. The tokenizer is trained on a part of easy-VQA's texts: the pretrained ones are not here.
    UserError if easy-VQA is not installed.
    """
    llm, vision = (cluster.table()[kind][name] for kind, name in zip(("llm", "vision"), model, strict=True))
    tokenizer = folder / "tokenizer"
    if not tokenizer.is_dir():
        records, _ = write_easy_vqa(folder, 100)
        train_tokenizer(texts_of([records]), VOCABULARY).save_pretrained(tokenizer)
    tree = yaml.safe_load(SMOLLM2.read_text(encoding="utf-8"))
    text = _sizes(llm, "llm", tiny) | {"max_position_embeddings": POSITIONS}
    tree["model"] = {
        "llm": {"type": llm["type"], "config": text, "tokenizer": str(tokenizer)},
        "vision": {"type": vision["type"], "config": _sizes(vision, "vision", tiny)},
        "connector": {"type": "mlp"},
    }
    tree["stages"][0]["data"]["template"] = "llama"  # it ends answers as that tokenizer does
    tree["engine"] |= {"device": device} | ({"dtype": "float32", "threads": 1} if tiny else {})
    path = folder / f"{model[0]}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def _sizes(part: Mapping[str, Mapping[str, object]], kind: str, tiny: bool) -> dict[str, object]:
    return {**part["config"], **(TINY[kind] if tiny else {})}
