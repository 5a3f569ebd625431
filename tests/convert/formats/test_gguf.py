"""GGUF files answer in llama.cpp as the model does here: its server, in this process, by the package xllamacpp."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from PIL import Image

from tests.infer.test_families import CHANGES, LARGER
from tests.models.llm.families import CONFIGS
from tests.tiny import make_model, tiny_config
from tests.vectors import GOLDEN
from tinyllava_fast.config.schema import ConnectorConfig, LLMConfig, ModelConfig, VisionConfig
from tinyllava_fast.convert.convert import export_model
from tinyllava_fast.convert.formats.gguf import MODEL, MODELFILE, PROJECTOR
from tinyllava_fast.data.bpe import train_tokenizer
from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.data.tokenizer import load_tokenizer
from tinyllava_fast.errors import UserError
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.types import Request, Sampling
from tinyllava_fast.models import io as model_io
from tinyllava_fast.models.build import build_image_processor, build_model
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.models.vision.clip import CLIPTower

STEPS = 12
QUESTION = "What is the blue shape?"
TEXTS = ["What is the blue shape in the image? It is a circle.", "USER: ASSISTANT: yes no red"] * 4
FAMILIES = ["gemma", "gemma2", "mistral", "openelm", "phi", "qwen2", "qwen3", "stablelm", "tinyllama"]
MISTRAL = CONFIGS["tinyllama"] | {"model_type": "mistral", "sliding_window": None, "head_dim": 12}
CHANGED = {
    "gemma2": CHANGES["gemma2"] | {"query_pre_attn_scalar": 8},
    "qwen2": {"use_sliding_window": False},
    "stablelm": {"qk_layernorm": False},
}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


@dataclasses.dataclass
class Exported:
    """A model and its GGUF folder."""

    lmm: LMM
    tokenizer: Any
    processor: Any
    folder: Path

    def ours(self, question: str, images: Sequence[Image.Image]) -> list[int]:
        template = TEMPLATES.get(self.lmm.config.template)
        engine = Engine(self.lmm, self.tokenizer, self.processor, template, image_mode="pad", batch_tokens=512)
        sampling = Sampling(max_new_tokens=STEPS, logit_bias=dict.fromkeys(self.unreadable(), -100.0))
        request = Request.ask(question, list(images) or None, sampling=sampling)
        return engine.answers([request])[0].tokens

    def unreadable(self) -> list[int]:
        """Ids that are no text by themselves: llama.cpp's server leaves out tokens of half a character."""
        tokens = self.tokenizer.get_vocab().items()
        return sorted(index for token, index in tokens if not token.replace("Ġ", "").isascii() or index in (0, 1, 3))


def describe(vision: str = "siglip", connector: str = "mlp", **llm: object) -> ModelConfig:
    base = tiny_config(**llm)
    select = "cls_patch" if vision == "siglip" else "patch"
    known = VISION if vision != "dinov2" else {name: VISION[name] for name in VISION if name != "intermediate_size"}
    tower = VisionConfig(type=vision, config=dict(known), feature_layer=-1, feature_select=select)
    return dataclasses.replace(base, vision=tower, connector=ConnectorConfig(type=connector))


def enlarged(lmm: LMM) -> LMM:
    """Weights so large that answers depend on prompt and image."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in lmm.named_parameters():
            if p.ndim > 1 and "position" not in name:
                p.copy_(torch.randn(p.shape, generator=generator) * (1.5 / p[0].numel() ** 0.5))
            elif name.startswith("llm") and "post_" in name and p.ndim == 1 and lmm.llm.config.model_type == "gemma2":
                p.fill_(16.0)  # or it would repeat the last token, whose row is the largest part of every state
    return lmm.eval()


def export(
    lmm: LMM, config: ModelConfig, folder: Path, tokenizer: Any = None, template: str = "llama", **options: Any
) -> Exported:
    tokenizer, processor = tokenizer or train_tokenizer(TEXTS, 268), build_image_processor(config)
    lmm.config = dataclasses.replace(lmm.config, template=template, image_mode="pad")
    model_io.save_model(lmm, tokenizer, processor, folder / "ours")
    export_model(folder / "ours", folder / "gguf", "gguf", **options)
    return Exported(lmm, tokenizer, processor, folder / "gguf")


def llama_cpp(exported: Exported) -> Any:
    """llama.cpp's server without a port of ours: every number in float32."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    params = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path = str(exported.folder / MODEL), str(exported.folder / PROJECTOR)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, False, 0
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def theirs(server: Any, exported: Exported, question: str, images: Sequence[Image.Image]) -> list[int]:
    parts: list[dict[str, object]] = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    reply = server.handle_chat_completions(
        {
            "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}],
            "max_tokens": STEPS,
            "temperature": 0,
            "logprobs": True,
            "logit_bias": [[index, False] for index in exported.unreadable()],
        }
    )
    return [piece["id"] for piece in reply["choices"][0]["logprobs"]["content"]]


@pytest.fixture(scope="module")
def pictures() -> Iterator[list[Image.Image]]:
    generator = np.random.default_rng(0)
    shapes = [(32, 32, 3), (48, 48, 3)]
    yield [Image.fromarray(generator.integers(0, 256, shape, np.uint8)) for shape in shapes]


def ended(tokens: list[int]) -> list[int]:
    """Without the end token, which llama.cpp does not list."""
    return tokens[:-1] if tokens and tokens[-1] == 2 else tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_of_text_and_of_one_and_two_pictures(family, pictures, tmp_path) -> None:
    changes = CHANGES[family] if family == "openelm" else LARGER | CHANGED.get(family, {})
    own = MISTRAL if family == "mistral" else CONFIGS[family]
    kind = "auto" if family == "mistral" else family
    config = dataclasses.replace(describe(), llm=LLMConfig(type=kind, config=own | changes))
    exported = export(enlarged(build_model(config)), config, tmp_path)
    server = llama_cpp(exported)
    answers = []
    for images in ([], pictures[:1], pictures[1:], pictures):
        question = "<image>\n" * len(images) + QUESTION
        expected = ended(exported.ours(question, images))
        assert theirs(server, exported, QUESTION, images) == expected
        answers.append(expected)
    assert len({tuple(answer) for answer in answers}) > 1


@pytest.mark.parametrize("connector", ["linear", "mlp1x_gelu"])
def test_one_linear_map_goes_through_the_graph_of_two(connector, pictures, tmp_path) -> None:
    config = describe(connector=connector)
    exported = export(enlarged(build_model(config)), config, tmp_path)
    expected = ended(exported.ours("<image>\n" + QUESTION, pictures[:1]))
    assert theirs(llama_cpp(exported), exported, QUESTION, pictures[:1]) == expected


def test_merged_patches_of_one_picture(pictures, tmp_path) -> None:
    config = describe(connector="pixel_shuffle")
    exported = export(enlarged(build_model(config)), config, tmp_path)
    server, shown = llama_cpp(exported), ([], pictures[:1], pictures[1:])
    answers = [ended(exported.ours("<image>\n" * len(images) + QUESTION, images)) for images in shown]
    assert [theirs(server, exported, QUESTION, images) for images in shown] == answers
    assert len({tuple(answer) for answer in answers}) == 3
    with pytest.raises(Exception, match="one picture a conversation"):
        theirs(server, exported, QUESTION, pictures)


def test_merged_patches_need_blocks_and_a_tokenizer_that_fit(tmp_path) -> None:
    config = dataclasses.replace(describe(), connector=ConnectorConfig(type="pixel_shuffle", options={"factor": 4}))
    with pytest.raises(UserError, match=r"factor: 4; llama.cpp merges blocks of 2 x 2"):
        export(build_model(config).eval(), config, tmp_path / "factor")
    config = describe(connector="pixel_shuffle", vocab_size=704)
    tokenizer = load_tokenizer(GOLDEN / "tokenizers" / "llama_spm")
    with pytest.raises(UserError, match="the line break behind it is no token of its own"):
        export(build_model(config).eval(), config, tmp_path / "tokenizer", tokenizer)


def test_the_first_patch_is_kept_where_that_is_asked_for(pictures, tmp_path, caplog) -> None:
    config = describe()
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, feature_select="patch"))
    lmm = enlarged(build_model(config))
    with pytest.raises(UserError, match=r"15 tokens, llama.cpp the 16 .*--keep-first-patch"):
        export(lmm, config, tmp_path / "refused")
    shown = tmp_path / "shown"
    shown.mkdir()
    for number, picture in enumerate(pictures):
        picture.save(shown / f"{number}.png")
    exported = export(lmm, config, tmp_path / "kept", keep_first_patch=shown)
    said = gguf.GGUFReader(exported.folder / MODEL).fields["general.description"].contents()
    assert "16 tokens a picture, and was trained on 15" in said and "of 2 answers" in said and said in caplog.text
    whole = dataclasses.replace(config, vision=dataclasses.replace(config.vision, feature_select="cls_patch"))
    exported.lmm = build_model(whole).eval()
    exported.lmm.load_state_dict(lmm.state_dict())
    exported.lmm.config = dataclasses.replace(exported.lmm.config, template="llama", image_mode="pad")
    expected = ended(exported.ours("<image>\n" + QUESTION, pictures[:1]))
    assert theirs(llama_cpp(exported), exported, QUESTION, pictures[:1]) == expected
    for folder, reason in ((tmp_path / "absent", "expected a folder of pictures"), (None, "drops no patch")):
        plain = config if folder else describe()
        with pytest.raises(UserError, match=reason):
            export(build_model(plain).eval(), plain, tmp_path / f"{folder is None}", keep_first_patch=folder or shown)


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("llama_spm", "llama"),
        ("llama_spm_legacy", "llama"),
        ("gemma_spm", "gemma"),
        ("phi_bytebpe", "phi"),
        ("qwen2_base_bytebpe", "qwen2_base"),
        ("stablelm_bytebpe", "phi"),
    ],
)
def test_llama_cpp_cuts_texts_into_the_same_tokens(name, template, tmp_path) -> None:
    tokenizer = load_tokenizer(GOLDEN / "tokenizers" / name)
    config = describe(vocab_size=704)
    server = llama_cpp(export(build_model(config).eval(), config, tmp_path, tokenizer, template))
    for text in (
        "What is the blue shape?",
        "USER: a  b\n c",
        "It's 12,345 o'clock; naïve, 中文 🙂",
        " leading",
        "ASSISTANT:",
    ):
        asked = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
        with urllib.request.urlopen(f"{server.listening_address}/tokenize", asked, timeout=20) as reply:
            found = json.load(reply)["tokens"]
        assert found == tokenizer(text, add_special_tokens=False).input_ids, text


def test_norms_of_gemma_are_one_more_than_what_is_stored(tmp_path) -> None:
    """In float32, as the model adds it: next to 1, bfloat16 has 8 bits."""
    config = dataclasses.replace(describe(), llm=LLMConfig(type="gemma", config=CONFIGS["gemma"] | LARGER))
    lmm = build_model(config).eval()
    with torch.no_grad():
        lmm.llm.model.norm.weight.fill_(0.0123)
    export(lmm, config, tmp_path, dtype=torch.bfloat16)
    stored = next(t for t in gguf.GGUFReader(tmp_path / "gguf" / MODEL).tensors if t.name == "output_norm.weight")
    assert np.allclose(stored.data, 1 + float(torch.tensor(0.0123, dtype=torch.bfloat16)), rtol=1e-6)


@pytest.mark.parametrize("weights", [None, "q8_0", "q4_0"])
def test_number_formats(weights, tmp_path) -> None:
    """What is stored is what was meant, within half a step of the format; llama.cpp takes the files."""
    wide = {"hidden_size": 64, "intermediate_size": 96}
    config = describe(**wide)
    options = {"dtype": torch.bfloat16} if weights is None else {"weights": weights}
    exported = export(enlarged(build_model(config)), config, tmp_path, **options)
    reader = gguf.GGUFReader(exported.folder / MODEL)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    name = "blk.0.ffn_up.weight"
    kind = stored[name].tensor_type.name
    assert kind == (weights or "bf16").upper()
    assert stored["token_embd.weight"].tensor_type.name == {None: "BF16", "q8_0": "Q8_0", "q4_0": "Q8_0"}[weights]
    assert stored["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    weight = exported.lmm.llm.model.layers[0].mlp.up_proj.weight.detach().numpy()
    read = gguf.quants.dequantize(stored[name].data, stored[name].tensor_type).reshape(weight.shape)
    steps = {"BF16": 2**-8, "Q8_0": 1 / 127, "Q4_0": 1 / 8}
    assert np.abs(read - weight).max() <= np.abs(weight).max() * steps[kind]
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(exported.folder / PROJECTOR).tensors}
    assert kinds == ({"F32", "BF16"} if weights is None else {"F32", "F16"})
    assert theirs(llama_cpp(exported), exported, QUESTION, [])


def test_rows_for_padding_and_settings(tmp_path) -> None:
    config = describe()
    exported = export(enlarged(build_model(config)), config, tmp_path)
    reader = gguf.GGUFReader(exported.folder / MODEL)
    known = len(exported.tokenizer)
    assert exported.lmm.vocab_size > known
    assert len(reader.fields["tokenizer.ggml.tokens"].data) == known
    assert next(t for t in reader.tensors if t.name == "output.weight").shape.tolist() == [48, known]
    assert reader.fields["tokenizer.ggml.eos_token_id"].contents() == 2
    assert reader.fields["tokenizer.ggml.add_bos_token"].contents() is True
    text = (exported.folder / MODELFILE).read_text()
    assert text.startswith(f"FROM ./{MODEL}\nFROM ./{PROJECTOR}\n") and 'PARAMETER stop "</s>"' in text
    assert 'questions. {{ end }}{{ if eq $message.Role "user" }}USER: {{ $message.Content }}{{ end }}' in text
    assert '{{ if eq $message.Role "assistant" }} ASSISTANT: {{ $message.Content }}</s>{{ end }}' in text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"connector": "pixel_shuffle", "vision": "clip"}, "vision.type: clip; llama.cpp merges"),
        ({"connector": "mlp3x_gelu"}, "connector: llama.cpp has no mlp"),
        ({"connector": "mlp2x_relu"}, "activation: relu"),
        ({"vision": "dinov2"}, "vision.type: dinov2"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type: linear"),
        ({"hidden_act": "gelu"}, "hidden_act: gelu"),
        ({"model_type": "gemma", "head_dim": 16, "tie_word_embeddings": False}, "tie_word_embeddings: false"),
        ({"model_type": "smollm3", "pad_token_id": None}, "llm: gguf export does not know smollm3"),
    ],
)
def test_what_llama_cpp_lacks_is_refused_by_name(changes, reason, tmp_path) -> None:
    config = describe(**changes)
    with pytest.raises(UserError, match=reason):
        export(build_model(config).eval(), config, tmp_path)
    assert not (tmp_path / "gguf").exists()


def class_token_last(tower: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """What llama.cpp makes of a picture for a CLIP encoder; of its output it leaves out the first row."""
    parts = tower.embeddings
    patches = parts.patch_embedding(pixels).flatten(2).transpose(1, 2)
    rows = torch.cat([patches, parts.class_embedding.expand(len(pixels), 1, -1)], dim=1)
    return tower.pre_layrnorm(rows + parts.position_embedding.weight)


def test_llama_cpp_puts_the_class_token_of_clip_last(pictures, tmp_path, caplog, monkeypatch) -> None:
    config = describe(vision="clip")
    exported = export(enlarged(build_model(config)), config, tmp_path)
    assert "class token" in caplog.text
    question = "<image>\n" + QUESTION
    ours = [ended(exported.ours(question, [picture])) for picture in pictures]
    monkeypatch.setattr(CLIPTower, "embed", class_token_last)
    last = [ended(exported.ours(question, [picture])) for picture in pictures]
    server = llama_cpp(exported)
    assert [theirs(server, exported, QUESTION, [picture]) for picture in pictures] == last != ours


def test_a_number_format_that_a_format_lacks(tmp_path) -> None:
    model_io.save_model(make_model(), train_tokenizer(TEXTS, 272), build_image_processor(tiny_config()), tmp_path / "m")
    with pytest.raises(UserError, match="--weights: llava has no q8_0; gguf has q8_0, q4_0"):
        export_model(tmp_path / "m", tmp_path / "out", "llava", weights="q8_0")
