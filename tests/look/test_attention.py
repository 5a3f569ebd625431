"""The weights that are recomputed for a few rows are those of an eager attention, in every language model family."""

from __future__ import annotations

import pytest
import torch

from tests.models.llm.families import CONFIGS, build, stock
from tests.tiny import make_model
from tinyllava_fast.look.attention import answer_log_probabilities, watched


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_equal_eager_attention(name: str) -> None:
    lmm = make_model()
    lmm.family, lmm.llm = build(name)
    lmm.llm.eval()
    lmm.embedding_scale, lmm.logit_softcap = lmm.family.embedding_scale(lmm.llm), lmm.family.logit_softcap(lmm.llm)
    embeds = torch.randn(9, lmm.llm.config.hidden_size, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([4, 7, 8])
    with torch.no_grad():
        run = watched(lmm, embeds, rows)
        plain, eager = stock(lmm.llm), []
        for module in plain.modules():
            if type(module).__name__.endswith("Attention"):
                module.register_forward_hook(lambda _, __, out: eager.append(out[1]))
        other = plain(inputs_embeds=embeds[None])
    assert len(run.weights) == len(eager) == len(run.hidden) > 0
    for mine, theirs in zip(run.weights, eager, strict=True):
        torch.testing.assert_close(mine, theirs[0][:, rows], atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(mine.sum(-1), torch.ones(mine.shape[:2]))
    torch.testing.assert_close(run.read(run.hidden[-1]), other.logits[0], atol=1e-4, rtol=1e-4)


def test_packed_answers_equal_single_ones() -> None:
    lmm = make_model()
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randn(n, 48, generator=generator) for n in (7, 11, 8)]
    tokens = torch.tensor([5, 9, 2])
    with torch.no_grad():
        packed = answer_log_probabilities(lmm, sequences, tokens, vocab=260, most=20)
        for total, embeds in zip(packed, sequences, strict=True):
            run = watched(lmm, embeds, torch.tensor([0]))
            log_p = lmm.logits(run.final[-3:])[:, :260].log_softmax(-1)
            assert float(total) == pytest.approx(float(log_p.gather(1, tokens[:, None]).sum()), abs=1e-4)
