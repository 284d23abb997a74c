"""The code in README and docs/ runs, on a tiny model that has the name of a real one, and its commands exist."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib.util
import io
import itertools
import json
import re
import shlex
import shutil
import tomllib

import pytest
import torch
from documents import DOCUMENTS, ROOT, Block, blocks_of, text_of

import geko_kernels as gk
from geko_kernels.cli import _parser
from geko_kernels.cli.options import read_options

MODELS = ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct")
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
OTHERS = ("apt-get", "git", "ncu")  # commands that are not ours
WITH_CODE = [document for document in DOCUMENTS if blocks_of(document, "python")]
WITH_COMMANDS = [document for document in DOCUMENTS if blocks_of(document, "sh", "bash", "")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the models and data that the documents name."""
    pytest.importorskip("transformers")
    from tiny_model import save_tiny_model
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("documents")
    for name in MODELS:
        save_tiny_model(folder / name)
    tokenizer = AutoTokenizer.from_pretrained(folder / MODELS[1])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / MODELS[1])
    turns = [
        [{"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": str(n + 1)}] for n in range(24)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in turns))
    with (folder / "reviews.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((f"film {n}", ("bad", "good")[n % 2]) for n in range(32))])
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """A copy of it, where a document's blocks run, with Trainer on the CPU, nothing reported elsewhere or drawn."""
    from transformers import TrainingArguments

    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    init = TrainingArguments.__post_init__

    def on_the_cpu(args):
        args.use_cpu, args.report_to, args.disable_tqdm, args.dataloader_pin_memory = True, "none", True, False
        init(args)

    monkeypatch.setattr(TrainingArguments, "__post_init__", on_the_cpu)
    if importlib.util.find_spec("matplotlib"):
        monkeypatch.setattr("geko_kernels.training.report.report._png", lambda figure: b"")  # the examples draw
    return tmp_path


def loop_names():
    """What a loop of one's own has: classes to learn, of items (inputs, label)."""
    inputs = torch.randn(128, 4)
    dataset = torch.utils.data.TensorDataset(inputs, (inputs[:, 0] > 0).long())
    model = torch.nn.Linear(4, 2)
    return {"dataset": dataset, "model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1)}


def trainer_names():
    """What a script with Trainer has."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODELS[1])
    items = [{"input_ids": tokenizer(f"{n} and {n}").input_ids} for n in range(24)]
    model = AutoModelForCausalLM.from_pretrained(MODELS[1])
    args = gk.GEKOTrainingArguments("run", num_train_epochs=1)
    given = {"tokenizer": tokenizer, "model": model, "args": args}
    return {"gk": gk, **given, "dataset": items[:16], "held_out": items[16:]}


def sft_names():
    """What a script with SFTTrainer has."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list([{"text": f"{n} and {n}"} for n in range(16)])
    return {"gk": gk, "trl": trl, "model": MODELS[0], "dataset": dataset}


def observed_names():
    """As `trainer_names`, with a plain Trainer."""
    from transformers import Trainer, TrainingArguments

    names = trainer_names()
    items = [{**item, "labels": item["input_ids"]} for item in names["dataset"] if len(item["input_ids"]) == 7]
    return {"gk": gk, "trainer": Trainer(names["model"], TrainingArguments("run"), train_dataset=items)}


# names that a block takes as given; all others it gets from the blocks before it in the same document
GIVEN = {
    ("README.md", "In a loop of your own"): [loop_names],
    ("README.md", "With Transformers"): [trainer_names, sft_names, observed_names],
    ("docs/data.md", "Training data"): [trainer_names],
    ("docs/guides/watching.md", "Without a tool"): [loop_names],
}


def without_figures(text: str) -> str:
    """`text` with each number as #: other machines compute others."""
    return re.sub(r"\d[\d.,]*", "#", text)


@pytest.mark.parametrize("document", WITH_CODE)
def test_python_blocks_run(document, folder):
    pytest.importorskip("accelerate")
    names: dict[str, object] = {}
    given = {section: iter(makers) for (page, section), makers in GIVEN.items() if page == document}
    torch.manual_seed(0)
    printed = ""
    for block in blocks_of(document, "python", "text"):
        if block.language == "text":
            assert without_figures(block.code) == without_figures(printed), f"what line {block.line} says is printed"
            continue
        code = compile("\n" * (block.line - 1) + block.code, ROOT / document, "exec")
        if block.reason:
            continue
        if "trl" in block.code:
            pytest.importorskip("trl")
        if block.section in given:
            names = next(given[block.section])()
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(code, names)
        printed = output.getvalue()


def commands_of(block: Block) -> list[list[str]]:
    """The words of each command, without comments, variables and prompts."""
    lines = [shlex.split(line, comments=True) for line in block.code.replace("\\\n", " ").splitlines()]
    parts: list[list[str]] = []
    for words in lines:
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command, words = words[:end], words[end + 1 :]
            parts.append(list(itertools.dropwhile(re.compile(r"[A-Z_]+=").match, command)))
    return [part for part in parts if part]


def check_command(words: list[str]) -> None:
    """Assert that a command of ours is there and takes the arguments."""
    first, *rest = words
    if first in ("python", ".venv/bin/python") and rest[:2] == ["-m", "geko_kernels"]:
        first, rest = "geko", rest[2:]
    if first == "geko":
        options = vars(_parser().parse_args(rest))
        if options.pop("command") == "train":
            given = read_options(options, options.pop("config"))
            for names, kind in ((given.geko, gk.GEKOConfig), (given.training_arguments, gk.GEKOTrainingArguments)):
                assert set(names) <= {field.name for field in dataclasses.fields(kind)}
    elif first == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert set(rest) <= set(targets), f"Makefile has no {rest}"
    elif first in ("python", ".venv/bin/python", "torchrun", "accelerate"):
        module = rest[rest.index("-m") + 1] if "-m" in rest else ""
        if module.startswith("benchmarks"):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
        for name in (word for word in rest if word.endswith(".py")):
            assert (ROOT / name).exists(), name
    elif first == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for named in re.findall(r"(?:\.|geko_kernels)\[([\w,]+)\]", " ".join(rest)):
            assert set(named.split(",")) <= set(extras), named
    else:
        assert first in OTHERS, f"what is {first}?"


@pytest.mark.parametrize("document", WITH_COMMANDS)
def test_commands_exist(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks_of(document, "yaml"):
        (tmp_path / "run.yaml").write_text(block.code)
    for block in blocks_of(document, "sh", "bash", ""):
        for words in commands_of(block):
            try:
                check_command(words)
            except SystemExit:
                pytest.fail(f"{document}, line {block.line}: the command line refuses {' '.join(words)}")


def test_commands_that_do_not_exist_are_found():
    modules = "python -m geko_kernels nothing", "python -m benchmarks.nothing", "python examples/nothing.py"
    for command in ("geko train --modle x", "gecko env", "make nothing", "pip install .[nothing]", *modules):
        with pytest.raises((AssertionError, SystemExit)):
            check_command(command.split())


def test_few_blocks_are_not_run():
    reasons = [block.reason for document in DOCUMENTS for block in blocks_of(document, "python") if block.reason]
    assert len(reasons) <= 3 and all(len(reason) > 10 for reason in reasons), reasons
    marks = [
        line for document in DOCUMENTS for line in text_of(document).splitlines() if line.startswith("<!-- not run")
    ]
    assert len(marks) == len(reasons), "a mark that stands before no block"
