import os
import signal
import subprocess
import sys

import pytest
import yaml

from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.errors import UserError
from tinyllava_fast.eval.benchmarks.base import BENCHMARKS
from tinyllava_fast.models.connectors.base import CONNECTORS
from tinyllava_fast.models.llm.base import LLMS
from tinyllava_fast.models.vision.base import VISION
from tinyllava_fast.recipes.base import RECIPES
from tinyllava_fast.train import cli, loop
from tinyllava_fast.train.loggers.base import LOGGERS
from tinyllava_fast.train.optimizers.base import OPTIMIZERS
from tinyllava_fast.train.stops import stop_on_signals


def test_arguments():
    path, resume, overrides, flags = cli.parse(
        ["a.yaml", "seed=1", "--optim.lr", "1e-4", "--log_every=5", "--resume", "never", "--print_config"]
    )
    assert (path, resume, flags) == ("a.yaml", "never", {"--print_config"})
    assert overrides == ["seed=1", "optim.lr=1e-4", "log_every=5"]
    assert cli.parse(["--resume=/x/y", "a.yaml"])[:2] == ("a.yaml", "/x/y")
    assert cli.parse(["-h"])[3] == {"--help"}
    assert cli.parse(["--print-config"])[3] == {"--print_config"}
    assert cli.parse(["a.yaml", "--seed", "-1"])[2] == ["seed=-1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.yaml", "b.yaml"], "unexpected argument 'b.yaml'"),
        (["a.yaml", "--seed"], "--seed: expected a value"),
        (["a.yaml", "--resume"], "expected auto, never or a path"),
        (["a.yaml", "--resume="], "expected auto, never or a path"),
        (["a.yaml", "--resume", "--profile"], "expected auto, never or a path"),
        (["a.yaml", "--seed", "--profile"], "--seed: expected a value"),
        (["a.yaml", "--wet"], "--wet: unknown flag; known: --dry-run, --help, --print-config, --profile, --resume"),
        (["a.yaml", "--print-confg"], r"--print-confg: unknown flag; did you mean --print-config\?"),
        (["a.yaml", "--resum=never"], r"unknown flag; did you mean --resume\?"),
        (["a.yaml", "--sed", "3"], r"unknown flag; did you mean --seed\?"),
        (["a.yaml", "--sed=3"], r"unknown flag; did you mean --seed\?"),
        (["a.yaml", "-x"], "-x: unknown flag; .*a key of the configuration is set by key.path=value"),
        (["a.yaml", "--"], "--: unknown flag"),
    ],
)
def test_arguments_it_cannot_place(arguments, message):
    with pytest.raises(UserError, match=message):
        cli.parse(arguments)


def test_help_lists_every_key(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for part in ("usage: tlf-train CONFIG", "--resume never", "stages.<name>.optim.lr: float", "engine.zero_stage"):
        assert part in shown
    registries = (LLMS, VISION, CONNECTORS, TEMPLATES, RECIPES, OPTIMIZERS, LOGGERS, BENCHMARKS)
    words = " ".join(shown.split())
    for registry in registries:
        assert f"Known: {', '.join(registry)}." in words, registry.kind
    assert cli.main([]) == 2
    assert len(capsys.readouterr().out.splitlines()) < 30, "without arguments: the usage, not every key"


def test_print_config_is_the_resolved_run(tiny_run, capsys):
    assert cli.main([str(tiny_run()), "stages.finetune.optim.lr=1e-4", "--print_config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["stages"][1]["optim"]["lr"] == 1e-4 and shown["seed"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}", "stages.finetune.optim.lrr=1"], "did you mean 'lr'"),
        (["missing.yaml"], "missing.yaml: no such config file"),
        (["--print_config"], "no configuration file given"),
        (["--profile"], "no configuration file given"),
        (["{}", "log_every=0"], "run.yaml: log_every: expected a whole number of at least 1, got 0"),
        (["{}", "model={{path: nowhere}}"], "model.path: nowhere: not a model folder: it does not exist"),
        (
            ["{}", "model.vision.config.patch_size=0"],
            "model.vision.config.patch_size: expected a whole number from 1 to 16384",
        ),
        (
            ["{}", "model.llm.config.num_attention_heads=0"],
            "model.llm.config.num_attention_heads: expected a whole number from 1 to 16777216",
        ),
        (["{}", "stages.finetune.recipe.options.x=1"], "stages.finetune.recipe.options.x: unknown key"),
        (["{}", "stages.finetune.recipe.type=x"], "stages.finetune.recipe.type: unknown recipe 'x'"),
        (
            ["{}", "stages.finetune.recipe.vision.tune=frozen", "stages.finetune.recipe.vision.from_layer=1"],
            "from_layer: set",
        ),
        (["{}", "engine.device=tpu"], "engine.device: 'tpu'; known: auto, cpu, cuda"),
        (["{}", "stages.pretrain.data.records=nowhere.json"], "nowhere.json"),
        (
            ["{}", "--resume", "nowhere"],
            "nowhere: not a checkpoint, it has no state.json; it does not exist: --resume takes auto, never",
        ),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(tiny_run, caplog, arguments, message):
    path = str(tiny_run())
    assert cli.main([a.format(path) for a in arguments]) == 2
    assert message in next(r.getMessage() for r in caplog.records if r.levelname == "ERROR")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_same_command_continues(tiny_run, losses, monkeypatch, number, code):
    path = tiny_run(checkpoint__every_steps=0)
    assert cli.main([str(path), "output_dir=" + str(path.parent / "whole")]) == 0
    advance = loop.Stage._advance

    def interrupted(stage, *arguments):
        advance(stage, *arguments)
        if stage.state.step == 7:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Stage, "_advance", interrupted)
        assert cli.main([str(path)]) == code
    run = path.parent / "run"
    assert [step for step, _, _ in losses(run)] == list(range(1, 8))
    assert (run / "checkpoints" / "latest").read_text() == "finetune-00000007\n"
    assert cli.main([str(path)]) == 0
    assert losses(run) == losses(path.parent / "whole")


def test_a_second_interrupt_stops_at_once(monkeypatch):
    def impatient(config, **_):
        run = type("Run", (), {"stop_signal": 0, "stepping": True})()
        with stop_on_signals(run):
            signal.raise_signal(signal.SIGINT)
            assert run.stop_signal == signal.SIGINT
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop, "train", impatient)
    monkeypatch.setattr("tinyllava_fast.config.load.load_run", lambda *_: None)
    assert cli.main(["x.yaml"]) == 130


def test_two_trainings_never_share_a_folder(tiny_run, tmp_path, caplog):
    folder = tmp_path / "shared"
    folder.mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(folder / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline()
        assert cli.main([str(tiny_run()), f"output_dir={folder}"]) == 2
        assert "another process trains in" in caplog.text
        holder.communicate(b"\n")


NO_HOME = """
import os, pwd, sys
def unknown(_):
    raise KeyError("getpwuid(): uid not found")
pwd.getpwuid = unknown
import getpass
from tinyllava_fast.train.cli import main
code = main([sys.argv[1]])
sys.exit(code)
"""


@pytest.fixture(scope="module")
def temporary(tmp_path_factory):
    """The folder for temporary files of the runs without a home: the first one compiles, the others find that."""
    return tmp_path_factory.mktemp("temporary")


@pytest.mark.slow
@pytest.mark.parametrize("home", [None, "", "/proc/nonexistent"])
def test_it_trains_without_a_home(home, tiny_run, temporary):
    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME", "TLF_CACHE")}
    env |= {"TMPDIR": str(temporary)} | ({} if home is None else {"HOME": home})
    done = subprocess.run([sys.executable, "-c", NO_HOME, str(tiny_run())], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no cache folder of this user can be written") == 1
    kept = temporary / f"tinyllava_fast-{os.getuid()}"
    assert (kept / "compile.json").is_file() and list(kept.glob("cpu_pool-*.so"))
