"""Answer a question with an ONNX export, without torch: python onnx_answer.py FOLDER "What is it?" [PICTURE ...]."""

import json
import sys
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image
from tokenizers import Tokenizer


def pixels(path, prepare):
    image = Image.open(path).convert("RGB")
    if prepare["do_pad"]:
        side, colour = max(image.size), tuple(int(255 * mean) for mean in prepare["image_mean"])
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    height, width = prepare["crop_size"]["height"], prepare["crop_size"]["width"]
    if prepare["do_center_crop"]:
        edge, short = prepare["size"]["shortest_edge"], min(image.size)
        image = image.resize([edge if s == short else int(edge * s / short) for s in image.size], prepare["resample"])
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    else:
        image = image.resize((width, height), prepare["resample"])
    levels = np.asarray(image, np.float32) * prepare["rescale_factor"]
    return ((levels - prepare["image_mean"]) / prepare["image_std"]).transpose(2, 0, 1)[None].astype(np.float32)


def answer(folder, question, pictures, most=64):
    names = "config", "preprocessor_config", "generation_config"
    config, prepare, ends = (json.loads((folder / f"{name}.json").read_text()) for name in names)
    names = "vision_encoder", "embed_tokens", "decoder_model_merged"
    vision, embed, decoder = (InferenceSession(folder / "onnx" / f"{name}.onnx") for name in names)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    image = "<image>" * config["image_seq_length"] + config["image_glue"]
    prompt = config["prompt"].replace("{question}", image * len(pictures) + question)
    ids = np.array([tokenizer.encode(prompt, add_special_tokens=False).ids])
    [hidden] = embed.run(None, {"input_ids": ids})
    for number, path in enumerate(pictures):
        [features] = vision.run(None, {"pixel_values": pixels(path, prepare)})
        slots = np.flatnonzero(ids[0] == config["image_token_index"]).reshape(len(pictures), -1)
        hidden[0, slots[number]] = features[0]
    past = {p.name: np.zeros((1, p.shape[1], 0, p.shape[3]), np.float32) for p in decoder.get_inputs()[3:]}
    tokens, length = [], 0
    while len(tokens) < most and not set(tokens[-1:]) & set(ends["eos_token_id"]):
        places = np.arange(length, length + hidden.shape[1])[None]
        length += hidden.shape[1]
        inputs = {"inputs_embeds": hidden, "attention_mask": np.ones((1, length), np.int64), "position_ids": places}
        logits, *present = decoder.run(None, inputs | past)
        past = dict(zip(past, present, strict=True))
        tokens.append(int(logits[0, -1].argmax()))
        [hidden] = embed.run(None, {"input_ids": np.array([tokens[-1:]])})
    return tokens, tokenizer.decode(tokens)


if __name__ == "__main__":
    sys.stdout.write(answer(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])[1] + "\n")
