"""The lmms-eval plug-in, against the installed package. `pip install tinyllava-fast[lmms]` brings it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points

import numpy as np
import pytest
import torch
from PIL import Image

from tinyllava_fast.errors import UserError
from tinyllava_fast.infer.assistant import Assistant

reason = "lmms-eval is not installed"
pytest.importorskip("lmms_eval", reason=reason)
instance = pytest.importorskip(
    "lmms_eval.api.instance", reason="lmms-eval lacks parts of its own", exc_type=ImportError
)
models = pytest.importorskip("lmms_eval.models", reason="lmms-eval lacks parts of its own", exc_type=ImportError)


def documents():
    """Six questions about two images (each opened anew for each of its questions), one about both, one about none."""
    rng = np.random.default_rng(3)
    pixels = [rng.integers(0, 256, (32, 40, 3), dtype=np.uint8) for _ in range(2)]
    shown = [(0,), (1,), (0,), (1,), (), (0, 1), (1,), (0,)]
    return [
        {"ask": f"Question {i}?" if i != 5 else "First <image>, second <image>?", "pixels": [pixels[j] for j in images]}
        for i, images in enumerate(shown)
    ]


def visual(document):
    return [Image.fromarray(p) for p in document["pixels"]] or None


def requests(kind, arguments):
    return [
        instance.Instance(
            request_type=kind, arguments=args, idx=0, metadata={"task": "t", "doc_id": args[-3], "repeats": 1}
        )
        for args in arguments
    ]


@pytest.fixture(scope="module")
def model(folder):
    """Made as the framework makes it."""
    cls = models.get_model("tinyllava_fast")
    made = cls.create_from_arg_string(
        f"pretrained={folder},batch_tokens=4096", {"batch_size": 4, "max_batch_size": None, "device": "cpu"}
    )
    made.task_dict["t"] = {"test": documents()}
    return made


def generation(model, **options):
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 1, "until": []} | options
    docs = model.task_dict["t"]["test"]
    return requests("generate_until", [(d["ask"], dict(options), visual, i, "t", "test") for i, d in enumerate(docs)])


def test_it_is_found_by_its_entry_point():
    (point,) = (p for p in entry_points(group="lmms_eval.models") if p.name == "tinyllava_fast")
    assert point.load()().model_id == "tinyllava_fast"
    resolved = models.MODEL_REGISTRY_V2.resolve("tinyllava_fast")
    assert resolved.model_type == "simple" and "tinyllava" in models.list_available_models()
    code = (
        "import sys, tinyllava_fast.eval.lmms_manifest; "
        "assert not {'torch', 'lmms_eval', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_answers_are_the_assistants_in_order(model, folder):
    found = model.generate_until(generation(model))
    images_before = model.assistant.engine.counters.images_encoded
    plain = Assistant.from_pretrained(folder, device="cpu", batch_tokens=4096)
    for doc, result in zip(documents(), found, strict=True):
        images = visual(doc)
        shown = None if images is None else images[0] if len(images) == 1 else images
        assert result.text == plain.answer(shown, doc["ask"], max_new_tokens=6)
        assert 0 < result.token_counts.output_tokens <= 6 < result.token_counts.input_tokens
    assert images_before <= 4  # two images, and both again for the question about two
    assert model.device == torch.device("cpu") and (model.rank, model.world_size) == (0, 1)


def test_until_and_cache(model):
    whole = model.generate_until(generation(model))
    stop = next(r.text[1] for r in whole if len(r.text) > 1)
    calls = []
    model.cache_hook = type("Hook", (), {"add_partial": lambda self, *args: calls.append(args)})()
    cut = model.generate_until(generation(model, until=[stop, ""]))
    assert [r.text for r in cut] == [r.text.split(stop)[0].strip() for r in whole] and len(calls) == len(whole)
    assert {name for name, _, _ in calls} == {"generate_until"}
    sampled = [model.generate_until(generation(model, do_sample=True, temperature=2.0)) for _ in range(2)]
    assert [r.text for r in sampled[0]] == [r.text for r in sampled[1]] != [r.text for r in whole]


def test_what_it_does_not_do(model, folder):
    with pytest.raises(UserError, match="task t: num_beams=3"):
        model.generate_until(generation(model, num_beams=3))
    bad = generation(model)
    bad[0].arguments = (*bad[0].arguments[:2], lambda doc: ["video.mp4"], *bad[0].arguments[3:])
    with pytest.raises(UserError, match="task t: str is no image"):
        model.generate_until(bad)
    with pytest.raises(NotImplementedError, match="single turns only"):
        model.generate_until_multi_round([])
    with pytest.raises(UserError, match="takes no 'batch_token'; did you mean 'batch_tokens'"):
        type(model)(str(folder), batch_token=3)


def test_log_likelihoods(model):
    docs = model.task_dict["t"]["test"]
    asked = requests(
        "loglikelihood",
        [
            (d["ask"], target, visual, i, "t", "test")
            for target in (" yes", lambda d: " no")
            for i, d in enumerate(docs)
        ],
    )
    found = model.loglikelihood(asked)
    assert len(found) == 2 * len(docs) and all(total < 0 and isinstance(greedy, bool) for total, greedy in found)
    alone = [model.loglikelihood([one])[0] for one in asked]
    assert [total for total, _ in found] == pytest.approx([total for total, _ in alone], abs=1e-4)


TASK = """
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
task: two_images
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
generation_kwargs: {max_new_tokens: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
UTILS = """
from PIL import Image
def doc_to_visual(doc): return [Image.open(doc["image"]).convert("RGB")]
def doc_to_text(doc, lmms_eval_specific_kwargs=None): return doc["question"]
"""
RUN = """
import json, sys
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
found = simple_evaluate(model="tinyllava_fast", model_args="pretrained=" + sys.argv[1], device="cpu",
    tasks=["two_images"], task_manager=TaskManager(include_path=sys.argv[2], include_defaults=False))
print("\\n" + json.dumps(found["results"]["two_images"]))
"""


@pytest.mark.slow
def test_a_task_of_lmms_eval_from_end_to_end(folder, tmp_path):
    """The framework finds the model, gives it a task of ours and scores what it says: three of four are right."""
    pytest.importorskip("lmms_eval.evaluator", reason="lmms-eval lacks parts of its own", exc_type=ImportError)
    plain = Assistant.from_pretrained(folder, device="cpu")
    rows = []
    for i in range(4):
        image = tmp_path / f"{i % 2}.png"
        visual(documents()[i])[0].save(image)
        said = plain.answer(image, f"What {i}?", max_new_tokens=6)
        rows.append({"image": str(image), "question": f"What {i}?", "answer": said if i else "nothing of the kind"})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    (tmp_path / "two_images.yaml").write_text(TASK.replace("DATA", str(tmp_path / "data.json")))
    (tmp_path / "utils.py").write_text(UTILS)
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", RUN, str(folder), str(tmp_path)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1])["exact_match,none"] == 0.75
