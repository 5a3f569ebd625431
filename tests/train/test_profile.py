import json

import torch

from tinyllava_fast.config.load import load_run
from tinyllava_fast.train.loop import train
from tinyllava_fast.train.profile import ROWS, state_bytes


def test_the_record_accounts_for_the_step(tiny_run, losses):
    path = tiny_run(stages__pretrain__max_steps=5, stages__finetune__max_steps=5)
    plain = load_run(path, ["output_dir=" + str(path.parent / "plain")])
    train(plain)
    train(load_run(path), profile=True)
    run = path.parent / "run"
    assert losses(run) == losses(path.parent / "plain")  # looking changes nothing
    for stage in ("pretrain", "finetune"):
        result = json.loads((run / f"profile-{stage}.json").read_text())
        seconds = {name: row["seconds"] for name, row in result["rows"].items()}
        assert list(seconds) == list(ROWS) and all(s > 0 for s in seconds.values())
        assert 0.5 * result["step_seconds"] < sum(seconds.values()) < 1.1 * result["step_seconds"]
        assert 0 < result["mfu"] < 1 and 0 < result["hfu"] < 1
        assert json.loads((run / f"profile-{stage}.trace.json").read_text())["traceEvents"]
        table = (run / f"profile-{stage}.md").read_text()
        assert all(f"| {title} |" in table for title in ROWS.values()) and len(table.splitlines()) < 60
    frozen, full = (json.loads((run / f"profile-{s}.json").read_text()) for s in ("pretrain", "finetune"))
    assert (
        full["rows"]["llm"]["flops"] > 1.2 * frozen["rows"]["llm"]["flops"]
    )  # no weight gradients of a frozen decoder
    assert frozen["state_bytes"]["llm, optimizer"] == 0 < full["state_bytes"]["llm, optimizer"]


def test_a_stage_too_short_to_record_says_so(tiny_run, caplog):
    path = tiny_run()
    train(load_run(path, ["stages.finetune.max_steps=1", "stages.pretrain.max_steps=1"]), profile=True)
    assert "stage pretrain has 1 steps, the record needs 5" in caplog.text
    assert not list((path.parent / "run").glob("profile-*"))


def test_state_is_counted_by_what_trains():
    class Model(torch.nn.Module):
        def component_parameters(self):
            weight = torch.nn.Parameter(torch.zeros(4, 2, dtype=torch.bfloat16))
            frozen = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
            return {"llm": [("w", weight)], "vision": [("f", frozen)]}

    expected = {"llm": 16, "llm, optimizer": 8 * 12, "vision": 12, "vision, optimizer": 0}
    assert state_bytes(Model()) == expected


def test_the_command_takes_the_flag(tiny_run, monkeypatch):
    from tinyllava_fast.train import cli, loop

    seen = {}
    monkeypatch.setattr(loop, "train", lambda config, **options: seen.update(options))
    path = str(tiny_run())
    assert cli.main([path, "--profile"]) == 0
    assert seen == {"resume": "auto", "profile": True, "file": path}
    assert cli.main(["--profile"]) == 2
