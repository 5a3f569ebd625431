"""Streamed text with tokenizers of every family: the pieces add up to what the tokenizer decodes."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders
from transformers import PreTrainedTokenizerFast

from tests.data.templates import families
from tinyllava_fast.infer.text import TextStream

DECODERS = {
    "none": lambda: None,
    "bytelevel": lambda: decoders.ByteLevel(),
    "metaspace_always": lambda: decoders.Metaspace("▁", "always"),
    "metaspace_never": lambda: decoders.Metaspace("▁", "never"),
    "wordpiece": lambda: decoders.WordPiece(cleanup=False),
    "wordpiece_cleanup": lambda: decoders.WordPiece(cleanup=True),
    "suffix": lambda: decoders.BPEDecoder("</w>"),
    "ctc": lambda: decoders.CTC(pad_token="<pad>", word_delimiter_token="▁"),
    "llama": lambda: decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "fallback_metaspace": lambda: decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", "always")]),
    "fuse": lambda: decoders.Sequence([decoders.Fuse(), decoders.Replace("▁", " ")]),
}
VOCABULARIES = {
    "bytes": ("bpe", "bytelevel", "none"),
    "fallback": ("bpe_fallback", "metaspace_always", "none"),
    "wordpiece": ("wordpiece", "bert", "none"),
    "words": ("wordlevel", "whitespace", "none"),
    "unigram": ("unigram", "metaspace_always", "none"),
}
TEXTS = [shape for turns, _ in families.SHAPES.values() for turn in turns[:4] for shape in turn] + [
    "it ' s , do n ' t . well ! ' no ' ? we ' ve",
    "it 's n't 're 've 'm . , ! ?  '  ' n't",
]
TIDIED = [
    " ",
    ".",
    "?",
    "!",
    ",",
    "'",
    "n",
    "t",
    "s",
    "m",
    "ve",
    "re",
    "n't",
    "'s",
    "a",
    "▁",
    "##t",
    "##'",
    "a</w>",
    ".</w>",
    "</w>",
]


def tokenizer(vocabulary, decoder, tidy):
    backend = Tokenizer.from_str(families._trained(*VOCABULARIES[vocabulary]))
    backend.add_tokens(TIDIED)
    if (step := DECODERS[decoder]()) is not None:
        backend.decoder = step
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=tidy, **names)


def streamed(tok, ids):
    stream = TextStream(tok)
    pieces = [stream.push(i) for i in ids]
    pieces.append(stream.close())
    assert "".join(pieces) == stream.text
    return stream.text


def answers(tok, seed):
    """Ids of texts, of any tokens, and of tokens that tidying looks at or that are bytes of a character."""
    rng = random.Random(seed)
    known = [i for i in (tok.convert_tokens_to_ids(t) for t in TIDIED) if i is not None]
    bytes_ = [tok.convert_tokens_to_ids(f"<0x{b:02X}>") for b in (0xE6, 0x97, 0xA5, 0x0A, 0x41)]
    sources = [range(len(tok)), known, [*bytes_, *known[:3]]]
    yield from (tok.encode(text, add_special_tokens=False) for text in TEXTS)
    for _ in range(12):
        for source in sources:
            yield [rng.choice(source) for _ in range(rng.randrange(1, 16))]


@pytest.mark.parametrize("tidy", [False, True])
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_pieces_add_up_to_what_is_decoded(vocabulary, decoder, tidy):
    tok = tokenizer(vocabulary, decoder, tidy)
    for ids in answers(tok, f"{vocabulary} {decoder}"):
        assert streamed(tok, ids) == tok.decode(ids, skip_special_tokens=True).strip(), tok.convert_ids_to_tokens(ids)
