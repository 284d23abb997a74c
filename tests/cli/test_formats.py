"""`load_dataset`: each format as people have it, in miniature; the token ids and labels that come of it."""

import gzip
import json
import sys

import pytest

pytest.importorskip("transformers")

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import geko_kernels as gk
from geko_kernels.training.formats import DataError, find_classes, read_records

VOCAB = "<unk> <eos> <|system|> <|user|> <|assistant|> <|tool|> a b c d e f true <think>".split()
UNK, EOS, SYSTEM, USER, BOT, TOOL, A, B, C, D, E, F, TRUE, THINK = range(len(VOCAB))
X = -100
TURN = "<|{{ m.role }}|>{{ m.content }}<eos>"
PROMPT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}" + PROMPT


def tokenizer(template=None):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCAB)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    made = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        eos_token="<eos>",
        pad_token="<eos>",
        extra_special_tokens=[*VOCAB[2:6], "<think>"],
    )
    made.chat_template = template
    return made


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def turns(*texts):
    """user, assistant, user, ..."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def items(data):
    return [(data[i]["input_ids"], data[i]["labels"]) for i in range(len(data))]


def texts(data):
    """Of `text` records: the input ids without the end."""
    return [ids[:-1] for ids, _ in items(data)]


class TestFiles:
    def test_prompts_as_text(self, tmp_path):
        path = written(tmp_path / "a.jsonl", [{"prompt": "a b", "completion": "c"}])
        assert items(gk.load_dataset(path, tokenizer(PLAIN))) == [([A, B, C, EOS], [X, X, C, EOS])]

    @pytest.mark.parametrize(
        "name, content",
        [
            ("a.jsonl", '{"text": "a"}\n{"text": "b c"}\n'),
            ("a.ndjson", '{"text": "a"}\n{"text": "b c"}\n'),
            ("a.json", '\n[{"text": "a"},\n {"text": "b c"}]'),
            ("a.json", '{"text": "a"}\n{"text": "b c"}\n'),
            ("a.csv", 'text\na\n\n"b\nc"\n'),
            ("a.CSV", "\ufefftext\r\na\r\nb c\r\n"),
            ("a.tsv", "n\ttext\n1\ta\n2\tb c\n"),
        ],
    )
    @pytest.mark.parametrize("packed", [False, True])
    def test_text_of_each_kind(self, tmp_path, name, content, packed):
        path = tmp_path / (name + (".gz" if packed else ""))
        path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
        assert texts(gk.load_dataset(str(path), tokenizer())) == [[A], [B, C]]

    def test_parquet_and_records_in_memory(self, tmp_path):
        datasets = pytest.importorskip("datasets")
        rows = [{"messages": turns("a", "b")}, {"messages": turns("c", "d")}]
        data = datasets.Dataset.from_list(rows)
        data.to_parquet(tmp_path / "a.parquet")
        expected = [([USER, u, EOS, BOT, b, EOS], [X, X, X, X, b, EOS]) for u, b in ((A, B), (C, D))]
        for given in (tmp_path / "a.parquet", data, rows):
            assert items(gk.load_dataset(given, tokenizer(PLAIN))) == expected
        data.save_to_disk(tmp_path / "saved")
        assert items(gk.load_dataset(tmp_path / "saved", tokenizer(PLAIN))) == expected

    def test_without_the_package_that_reads_them(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        (tmp_path / "a.parquet").write_bytes(b"PAR1")
        with pytest.raises(DataError, match=r"reading .*a.parquet needs `pip install datasets`"):
            gk.load_dataset(tmp_path / "a.parquet", tokenizer())
        assert texts(gk.load_dataset(written(tmp_path / "a.jsonl", [{"text": "a"}]), tokenizer())) == [[A]]

    def test_what_is_no_data(self):
        with pytest.raises(TypeError, match="data must be a path, a hub name or an iterable of records, got int"):
            gk.load_dataset(3, tokenizer())
        with pytest.raises(DataError, match=r"splits or columns \['train'\]; give one split, or a list of records"):
            gk.load_dataset({"train": [{"text": "a"}]}, tokenizer())
        with pytest.raises(DataError, match="the dataset, record 1: must be a mapping of column to value, got 'b'"):
            gk.load_dataset([{"text": "a"}, "b"], tokenizer())
        for wrong in (None, "a/name"):
            with pytest.raises(TypeError, match=f"a tokenizer of Transformers, got {wrong!r}: AutoTokenizer makes one"):
                gk.load_dataset([{"text": "a"}], wrong)
        with pytest.raises(ValueError, match="max_length must be an integer of at least 2, got 1"):
            gk.load_dataset([{"text": "a"}], tokenizer(), max_length=1)

    def test_damaged_parquet(self, tmp_path):
        pytest.importorskip("datasets")
        (tmp_path / "a.parquet").write_bytes(b"PAR1")
        with pytest.raises(DataError, match=r"cannot load .*a.parquet with `datasets` \(.*; give a .jsonl or .parquet"):
            gk.load_dataset(tmp_path / "a.parquet", tokenizer())

    def test_values_stay_what_they_are(self, tmp_path):
        path = written(tmp_path / "a.jsonl", [{"text": "2020-01-01"}, {"text": "2020-01-02"}])
        assert texts(gk.load_dataset(path, tokenizer())) == [[UNK], [UNK]]
        (tmp_path / "a.csv").write_text("text,label\nNA,007\nb,None\n")
        assert gk.load_dataset(tmp_path / "a.csv", tokenizer()).class_names == ["007", "None"]

    def test_folder_in_sorted_order(self, tmp_path):
        written(tmp_path / "b.jsonl", [{"text": "c"}])
        written(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}])
        (tmp_path / "below").mkdir()
        written(tmp_path / "below" / "a.json", [{"text": "d"}])
        written(tmp_path / ".hidden.jsonl", [{"text": "f"}])
        (tmp_path / "README.md").write_text("# not data")
        data = gk.load_dataset(tmp_path, tokenizer())
        assert texts(data) == [[A], [B], [C], [D]]
        assert data.notes == [f"{tmp_path}: read a.jsonl, b.jsonl, below/a.json"]
        written(tmp_path / "b.jsonl", [{"text": 3}])
        with pytest.raises(DataError, match=r", b.jsonl, line 1: `text` must be text, got 3"):
            gk.load_dataset(tmp_path, tokenizer())

    def test_folder_of_splits(self, tmp_path):
        written(tmp_path / "test.jsonl", [{"text": "c"}])
        with pytest.raises(DataError, match="holds only test.jsonl, none for training; give the file that you want"):
            gk.load_dataset(tmp_path, tokenizer())
        written(tmp_path / "more.jsonl", [{"text": "d"}])
        assert texts(gk.load_dataset(tmp_path, tokenizer())) == [[D]]
        written(tmp_path / "train-0.jsonl", [{"text": "a"}])
        written(tmp_path / "train-1.jsonl", [{"text": "b"}])
        data = gk.load_dataset(tmp_path, tokenizer())
        assert texts(data) == [[A], [B]]
        assert data.notes == [
            f"{tmp_path}: read train-0.jsonl, train-1.jsonl; left out, as not for training: more.jsonl, test.jsonl"
        ]

    @pytest.mark.parametrize(
        "content, message",
        [
            ("text,label\na,b,c\n", "line 2: 3 fields, but line 1 names 2 columns"),
            ("text,label\na\n", "line 2: 1 fields, but line 1 names 2 columns"),
            ("text,text\na,b\n", "line 1: every column needs a different name, got ['text', 'text']"),
            ('text\n"a\n', "line 2: unexpected end of data"),
            (
                "a;b\nc;d\n",
                "the first record has the fields ['a;b']; `train` needs `text`, or `prompt` and `completion`",
            ),
            ("text,label\na,\n", "line 2: `label` is empty"),
            ("text,label\na,x\nb, \n", "line 3: `label` is empty"),
            ("text,label\na,x\nb,y\nc,x \n", "the labels 'x' and 'x ' differ only in blanks; write them alike"),
            ("text\n", "holds no records"),
        ],
    )
    def test_wrong_table(self, tmp_path, content, message):
        (tmp_path / "a.csv").write_text(content)
        with pytest.raises(DataError) as told:
            gk.load_dataset(tmp_path / "a.csv", tokenizer())
        assert message in str(told.value)

    @pytest.mark.parametrize("content, message", [("[1]", "record 0 is not a JSON object"), ("[{,]", "is not JSON (")])
    def test_wrong_array(self, tmp_path, content, message):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(DataError) as told:
            gk.load_dataset(tmp_path / "a.json", tokenizer())
        assert message in str(told.value)


class TestPlaces:
    """What does not exist is sought on the hub only if it can be nothing else."""

    @pytest.fixture(autouse=True)
    def hub(self, monkeypatch):
        datasets = pytest.importorskip("datasets")
        self.asked = []
        rows = {"train": [{"text": "a"}]}
        monkeypatch.setattr(datasets, "load_dataset", lambda name: self.asked.append(name) or rows)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    @pytest.mark.parametrize(
        "path", ["none", "./org/none", "/org/none", "~/none", "~none/none", "../none", "a/b/c", "org/none.jsonl",
                 "org/none.parquet", "none.csv", "here/none", "a\\b", ""],
    )  # fmt: skip
    def test_local_paths_are_not(self, tmp_path, monkeypatch, path):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "here").mkdir()
        with pytest.raises(
            DataError, match="there is no such file or folder; |No such file or directory|does not exist"
        ):
            gk.load_dataset(path, tokenizer())
        assert self.asked == []

    def test_names_on_the_hub_are(self, monkeypatch):
        assert texts(gk.load_dataset("org/none", tokenizer())) == [[A]] and self.asked == ["org/none"]

    def test_offline_the_cache_is_asked(self, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert texts(gk.load_dataset("org/none", tokenizer())) == [[A]]

        def fail(name):
            raise ConnectionError("offline")

        monkeypatch.setattr("datasets.load_dataset", fail)
        with pytest.raises(DataError, match="cannot load org/none: there is no .* HF_HUB_OFFLINE is set, only"):
            gk.load_dataset("org/none", tokenizer())


class TestLabels:
    @pytest.mark.parametrize(
        "labels, names, numbers",
        [
            (["good", "bad"], ["bad", "good"], [1, 0]),
            (["true", "False"], ["false", "true"], [1, 0]),
            (["1", "0"], ["0", "1"], [1, 0]),
            (["10", "9"], ["9", "10"], [1, 0]),
            (["01", "1"], ["01", "1"], [0, 1]),
        ],
    )
    def test_of_a_table(self, tmp_path, labels, names, numbers):
        (tmp_path / "a.csv").write_text(f"label,text\n{labels[0]},a\n{labels[1]},b\n")
        data = gk.load_dataset(tmp_path / "a.csv", tokenizer())
        assert items(data) == [([A], numbers[0]), ([B], numbers[1])] and data.class_names == names

    def test_held_out_table_is_read_by_the_labels_of_training(self, tmp_path):
        (tmp_path / "names.csv").write_text("text,label\na,1\na,x\n")
        (tmp_path / "whole.csv").write_text("text,label\na,1\na,0\n")
        (tmp_path / "one.csv").write_text("text,label\na,1\n")
        one = read_records(tmp_path / "one.csv")
        assert find_classes(read_records(tmp_path / "names.csv"), {}).numbers(one) == [0]
        assert find_classes(read_records(tmp_path / "whole.csv"), {}).numbers(one) == [1]
        with pytest.raises(DataError, match="line 3: the label 'x' is not in the training data, which has 0, 1"):
            find_classes(read_records(tmp_path / "whole.csv"), {}).numbers(read_records(tmp_path / "names.csv"))

    def test_true_and_false(self, tmp_path):
        datasets = pytest.importorskip("datasets")
        rows = [{"text": "a", "label": True}, {"text": "b", "label": False}]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
        for path in (written(tmp_path / "a.jsonl", rows), tmp_path / "a.parquet"):
            data = gk.load_dataset(path, tokenizer())
            assert items(data) == [([A], 1), ([B], 0)] and data.class_names == ["false", "true"]

    def test_column_of_another_name(self, tmp_path):
        rows = [{"text": "a", "mood": "x", "label": 7}, {"text": "b", "mood": "y", "label": 7}]
        path = written(tmp_path / "a.jsonl", rows)
        data = gk.load_dataset(path, tokenizer(), label_column="mood")
        assert items(data) == [([A], 0), ([B], 1)] and data.class_names == ["x", "y"]
        assert f"{path}: columns that are not used: label" in data.notes
        with pytest.raises(DataError, match=r"has no `moods`, only \['label', 'mood', 'text'\]; a label column needs"):
            gk.load_dataset(path, tokenizer(), label_column="moods")


class TestLength:
    def test_cut_and_skipped_are_told(self, tmp_path):
        rows = [{"messages": turns(*said)} for said in (("a", "b"), ("a a a a", "b"), ("c",), ("d", "e e e e"))]
        path = written(tmp_path / "a.jsonl", rows)
        data = gk.load_dataset(path, tokenizer(PLAIN), max_length=6)
        assert items(data) == [
            ([USER, A, EOS, BOT, B, EOS], [X, X, X, X, B, EOS]),
            ([USER, D, EOS, BOT, E, E], [X, X, X, X, E, E]),
        ]
        assert data.skipped_rows == [1, 2] and data.num_cut == 2
        assert data.notes == [
            f"{path}: 2 of 4 records are longer than max_length=6 and lose their end",
            f"{path}: 2 of 4 records have no token to train within max_length=6 and are skipped: row 1 (line 2), "
            "2 (line 3); rows are counted from 0, and the other rows keep their numbers in the report",
        ]

    def test_nothing_left(self, tmp_path):
        path = written(tmp_path / "a.jsonl", [{"messages": turns("a")}])
        with pytest.raises(
            DataError, match=r"none of the 1 records has a token to train within max_length=6: raise it"
        ):
            gk.load_dataset(path, tokenizer(PLAIN), max_length=6)

    def test_the_first_token_of_a_text_is_predicted_by_nothing(self, tmp_path):
        words = tokenizer()
        words.eos_token = None
        data = gk.load_dataset(written(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "a b"}]), words)
        assert items(data) == [([A, B], [A, B])] and data.skipped_rows == [0]
