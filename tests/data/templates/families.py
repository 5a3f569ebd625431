"""Tokenizers of every family, trained here in milliseconds, and conversations of every shape to try on them.

A pipeline is a model, a pre-tokenizer, a normalizer and a post-processor of the ``tokenizers`` package, by name.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import cycle, product

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "[CLS]", "[SEP]", "<|endoftext|>", "<eos>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: what colour is it? ASSISTANT: red green blue grey 0123456789",
    "user assistant what is in the picture? naïve café 日本 a b c d e f g h i j k l m n o p q r s t u v w x y z",
] * 20

MODELS = {
    "bpe": lambda: models.BPE(unk_token="<unk>"),
    "bpe_without_unk": lambda: models.BPE(),
    "bpe_fallback": lambda: models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True),
    "wordpiece": lambda: models.WordPiece(unk_token="<unk>", max_input_chars_per_word=1000),
    "wordlevel": lambda: models.WordLevel(unk_token="<unk>"),
    "unigram": lambda: models.Unigram(),
}
_split = pre_tokenizers.Split
PRE_TOKENIZERS = {
    "none": lambda: None,
    "bytelevel": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "bytelevel_prefix": lambda: pre_tokenizers.ByteLevel(add_prefix_space=True),
    "bytelevel_whole": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    "metaspace_always": lambda: pre_tokenizers.Metaspace("▁", "always"),
    "metaspace_first": lambda: pre_tokenizers.Metaspace("▁", "first"),
    "metaspace_never": lambda: pre_tokenizers.Metaspace("▁", "never"),
    "metaspace_whole": lambda: pre_tokenizers.Metaspace("▁", "always", split=False),
    "whitespace": lambda: pre_tokenizers.Whitespace(),
    "whitespace_split": lambda: pre_tokenizers.WhitespaceSplit(),
    "bert": lambda: pre_tokenizers.BertPreTokenizer(),
    "digits": lambda: pre_tokenizers.Digits(individual_digits=True),
    "punctuation": lambda: pre_tokenizers.Punctuation("isolated"),
    "punctuation_removed": lambda: pre_tokenizers.Punctuation("removed"),
    "split_removed": lambda: _split(" ", "removed"),
    "split_next": lambda: _split(" ", "merged_with_next"),
    "split_previous": lambda: _split(" ", "merged_with_previous"),
    "split_words": lambda: _split(Regex(r"\w+|[^\w\s]+"), "isolated"),
    "delimiter": lambda: pre_tokenizers.CharDelimiterSplit(" "),
    "scripts": lambda: pre_tokenizers.UnicodeScripts(),
    "fixed": lambda: pre_tokenizers.FixedLength(4),
    "qwen": lambda: pre_tokenizers.Sequence(
        [_split(Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"), pre_tokenizers.ByteLevel(False, False)]
    ),
    "words_digits": lambda: pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)]),
    "scripts_metaspace": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.UnicodeScripts(), pre_tokenizers.Metaspace("▁", "first")]
    ),
}
NORMALIZERS = {
    "none": lambda: None,
    "nfc": lambda: normalizers.NFC(),
    "nfd": lambda: normalizers.NFD(),
    "nfkc": lambda: normalizers.NFKC(),
    "lowercase": lambda: normalizers.Lowercase(),
    "accents": lambda: normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    "bert": lambda: normalizers.BertNormalizer(lowercase=True),
    "llama": lambda: normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    "longer": lambda: normalizers.Replace("e", "eee"),
    "shorter": lambda: normalizers.Replace(Regex(r"\s+"), " "),
    "strip": lambda: normalizers.Strip(),
    "nmt": lambda: normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()]),
}
_ids = {token: number for number, token in enumerate(SPECIAL)}


def _framed(single: str) -> processors.TemplateProcessing:
    names = [name for name in single.split() if name != "$A"]
    return processors.TemplateProcessing(single=single, special_tokens=[(name, _ids[name]) for name in names])


POST_PROCESSORS = {
    "none": (lambda: None, []),
    "front": (lambda: _framed("<s> $A"), ["<s>"]),
    "end": (lambda: _framed("$A </s>"), []),
    "both": (lambda: _framed("<s> $A </s>"), ["<s>"]),
    "two_in_front": (lambda: _framed("[CLS] <s> $A [SEP]"), ["[CLS]", "<s>"]),
    "bytelevel": (lambda: processors.ByteLevel(trim_offsets=False), []),
    "bytelevel_trim": (lambda: processors.ByteLevel(trim_offsets=True), []),
    "roberta": (lambda: processors.RobertaProcessing(("</s>", 2), ("<s>", 1), trim_offsets=True), ["<s>"]),
    "bert": (lambda: processors.BertProcessing(("[SEP]", 5), ("[CLS]", 4)), ["[CLS]"]),
    "trim_and_both": (
        lambda: processors.Sequence([processors.ByteLevel(trim_offsets=True), _framed("<s> $A </s>")]),
        ["<s>"],
    ),
}

Pipeline = tuple[str, str, str, str]  # model, pre-tokenizer, normalizer, post-processor


def pipelines() -> list[Pipeline]:
    """Every model with every pre-tokenizer, normalizers and post-processors in turn; then those with one another."""
    others = cycle(product(NORMALIZERS, POST_PROCESSORS))
    found: dict[Pipeline, None] = {(*pair, *next(others)): None for pair in product(MODELS, PRE_TOKENIZERS)}
    usual = [("bpe", "bytelevel"), ("unigram", "metaspace_always"), ("wordpiece", "bert"), ("bpe_fallback", "none")]
    found |= {(*pair, *more): None for pair in usual for more in product(NORMALIZERS, POST_PROCESSORS)}
    return list(found)


@functools.cache
def _trained(model: str, pre: str, normalizer: str) -> str:
    """The pipeline without its post-processor, as JSON."""
    backend = Tokenizer(MODELS[model]())
    if (step := NORMALIZERS[normalizer]()) is not None:
        backend.normalizer = step
    if (cut := PRE_TOKENIZERS[pre]()) is not None:
        backend.pre_tokenizer = cut
    special = SPECIAL + ([f"<0x{i:02X}>" for i in range(256)] if model == "bpe_fallback" else [])
    more = {"special_tokens": special, "show_progress": False}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) if pre.startswith("bytelevel") or pre == "qwen" else []
    kind = model.partition("_")[0]
    if kind == "bpe":
        trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, **more)
    elif kind == "wordpiece":
        trainer = trainers.WordPieceTrainer(vocab_size=600, initial_alphabet=alphabet, **more)
    elif kind == "wordlevel":
        trainer = trainers.WordLevelTrainer(**more)
    else:
        trainer = trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", initial_alphabet=alphabet, **more)
    # whole sentences are one word without a pre-tokenizer: a language of few words is enough
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return backend.to_str()


@functools.cache
def tokenizer(pipeline: Pipeline) -> PreTrainedTokenizerFast:
    """The trained tokenizer of a pipeline."""
    *trained, post = pipeline
    backend = Tokenizer.from_str(_trained(*trained))
    if (step := POST_PROCESSORS[post][0]()) is not None:
        backend.post_processor = step
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML, **names)


def front(pipeline: Pipeline) -> list[int]:
    """Ids that the pipeline puts before a text."""
    return [_ids[name] for name in POST_PROCESSORS[pipeline[3]][1]]


def raw(pipeline: Pipeline) -> Tokenizer:
    """The pipeline without its post-processor: nothing is added, offsets are not trimmed."""
    return _raw(pipeline[:3])


@functools.cache
def _raw(trained: tuple[str, str, str]) -> Tokenizer:
    return Tokenizer.from_str(_trained(*trained))


Turn = tuple[str, str]
SHAPES: dict[str, tuple[list[Turn], bool]] = {
    "one": ([("<image>\nwhat colour is it?", "red")], False),
    "three": ([("<image>\nwhat is it?", "red"), ("what colour?", "blue grey"), ("why?", "so it is.")], False),
    "many": ([("<image>\nwhat colour is it?", "red")] + [("what colour?", "blue grey")] * 60, False),
    "letters": ([("<image>\na?", "a"), ("b?", "B"), ("c?", "é")], False),
    "empty": ([("<image>", ""), ("", "a"), ("so?", "")], False),
    "emoji": ([("<image>\nwhat 🙂?", "🙂🙂 e\u0301 👩‍👩‍👧"), ("é?", "cafe\u0301 café")], False),
    "cjk": ([("<image>\n这是什么", "日本红色的猫。"), ("为什么", "因为红")], False),
    "newlines": ([("<image>\na\n\nb", "a\nb\n\nc"), ("x\ty", "\nred\n")], False),
    "digits": ([("<image>\nhow many?", "1234567"), ("and 20?", "3.14, 42%")], False),
    "spaces": ([("<image>\n what ", " red "), (" so", "  blue   grey  ")], False),
    "separator": ([("<image>\nsay it", " ASSISTANT:"), ("again USER:", "USER: ASSIST")], False),
    "interleaved": ([("<image> and <image>: which?", "the first"), ("<image>\nand this?", "no")], True),
    "text": ([("what colour is it?", "red"), ("why?", "so")], False),
}


def cases(every: int = 1) -> Iterator[tuple[Pipeline, str, str]]:
    """(pipeline, shape, template), ``every``-th of them, each pipeline as often as the others."""
    templates = ("phi", "llama", "gemma", "pretrain", "tokenizer")
    for number, pipeline in enumerate(pipelines()):
        for at, (shape, template) in enumerate(product(SHAPES, templates)):
            if (at + number) % every == 0 and not (template == "pretrain" and shape == "text"):
                yield pipeline, shape, template
