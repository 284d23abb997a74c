"""`load_dataset` of chats and instructions; see test_formats.py."""

import pytest

pytest.importorskip("transformers")

from test_formats import (
    BOT,
    EOS,
    PLAIN,
    PROMPT,
    SYSTEM,
    THINK,
    TURN,
    USER,
    A,
    B,
    C,
    D,
    E,
    F,
    X,
    items,
    tokenizer,
    turns,
    written,
)

import geko_kernels as gk
from geko_kernels.training.formats import DataError

MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>"
    "{% generation %}{{ m.content }}{% endgeneration %}<eos>{% else %}" + TURN + "{% endif %}{% endfor %}" + PROMPT
)
UNSTABLE = (  # thoughts stand in the last turn alone
    "{% for m in messages %}<|{{ m.role }}|>{% if loop.last and m.role == 'assistant' %}<think>{% endif %}"
    "{{ m.content }}<eos>{% endfor %}" + PROMPT
)


class TestChats:
    IDS = [USER, A, EOS, BOT, B, C, EOS, USER, D, EOS, BOT, E, EOS]
    LABELS = [X, X, X, X, B, C, EOS, X, X, X, X, E, EOS]

    @pytest.mark.parametrize("template, labels", [(PLAIN, LABELS), (MARKED, [X, X, X, X, B, C, X, X, X, X, X, E, X])])
    def test_messages_train_all_turns_of_the_assistant(self, tmp_path, template, labels):
        path = written(tmp_path / "a.jsonl", [{"messages": turns("a", "b c", "d", "e")}])
        assert items(gk.load_dataset(path, tokenizer(template))) == [(self.IDS, labels)]

    @pytest.mark.parametrize("names", [("from", "value", "human", "gpt"), ("role", "content", "user", "assistant")])
    def test_sharegpt(self, tmp_path, names):
        role, content, user, bot = names
        said = [("system", "f"), (user, "a"), (bot, "b c"), (user, "d"), (bot, "e")]
        path = written(tmp_path / "a.jsonl", [{"conversations": [{role: who, content: text} for who, text in said]}])
        expected = ([SYSTEM, F, EOS, *self.IDS], [X, X, X, *self.LABELS])
        assert items(gk.load_dataset(path, tokenizer(PLAIN))) == [expected]

    @pytest.mark.parametrize("template, end", [(PLAIN, EOS), (MARKED, X)])
    def test_conversational_completion_trains_only_the_completion(self, tmp_path, template, end):
        said = turns("a", "b c", "d", "e")
        path = written(tmp_path / "a.jsonl", [{"prompt": said[:3], "completion": said[3:]}])
        assert items(gk.load_dataset(path, tokenizer(template))) == [(self.IDS, [X] * 11 + [E, end])]

    def test_a_table_that_fills_keys_up_is_the_same_chat(self, tmp_path):
        pytest.importorskip("datasets")
        said = [{**turn, "tool_calls": None} for turn in turns("a", "b c", "d", "e")]
        asks = "{% for m in messages %}{% if m.tool_calls is defined %}f{% endif %}" + TURN + "{% endfor %}" + PROMPT
        path = written(tmp_path / "a.jsonl", [{"messages": said}])
        assert items(gk.load_dataset(path, tokenizer(asks))) == [(self.IDS, self.LABELS)]

    def test_template_whose_beginnings_change(self, tmp_path):
        path = written(tmp_path / "a.jsonl", [{"messages": turns("a", "b")}, {"messages": turns("a", "b", "c", "d")}])
        with pytest.raises(DataError) as told:
            gk.load_dataset(path, tokenizer(UNSTABLE))
        assert f"{path}, line 2: the chat template does not render the turns up to the assistant's (turn 1)" in str(
            told.value
        )
        assert "mark them in the template with {% generation %} and {% endgeneration %}" in str(told.value)
        one = written(tmp_path / "b.jsonl", [{"messages": turns("a", "b")}])
        assert items(gk.load_dataset(one, tokenizer(UNSTABLE))) == [
            ([USER, A, EOS, BOT, THINK, B, EOS], [X, X, X, X, THINK, B, EOS])
        ]

    @pytest.mark.parametrize(
        "row, message",
        [
            ({"messages": "a"}, "`messages` must be a list of turns, got text"),
            ({"messages": []}, "`messages` is empty"),
            ({"messages": ["a"]}, "`messages`[0] must be a turn with `role` and `content`, got 'a'"),
            ({"messages": [{"content": "a"}]}, "`messages`[0] has no `role` (or ShareGPT's `from`), only ['content']"),
            (
                {"messages": [{"role": "user", "content": [{"text": "a"}]}]},
                "`messages`[0]: `content` must be text, got",
            ),
            ({"messages": [{"role": "user", "content": "\ud800"}]}, "`content` has a lone surrogate"),
            (
                {"conversations": [{"from": "bing", "value": "a"}]},
                "`from` must be human, gpt, system or tool, got 'bing'",
            ),
            ({"prompt": turns("a"), "completion": "b"}, "`prompt` is a list of turns and `completion` is text"),
            ({"prompt": 3, "completion": "b"}, "`prompt` must be text or a list of turns, got 3"),
        ],
    )
    def test_wrong_turns_are_named(self, tmp_path, row, message):
        path = written(tmp_path / "a.jsonl", [row])
        with pytest.raises(DataError) as told:
            gk.load_dataset(path, tokenizer(PLAIN))
        assert f"{path}, line 1: " in str(told.value) and message in str(told.value)

    def test_chat_that_the_assistant_begins(self, tmp_path):
        path = written(tmp_path / "a.jsonl", [{"messages": turns("a", "b", "c")[1:]}])
        with pytest.raises(DataError, match="line 1: the conversation begins with a turn of the assistant, but"):
            gk.load_dataset(path, tokenizer(PLAIN))
        assert items(gk.load_dataset(path, tokenizer(MARKED))) == [([BOT, B, EOS, USER, C, EOS], [X, B, X, X, X, X])]

    def test_tokenizer_without_a_template(self, tmp_path):
        path = written(tmp_path / "a.jsonl", [{"messages": turns("a", "b")}])
        with pytest.raises(DataError, match="has no chat template: take the model's chat or instruct version, or set"):
            gk.load_dataset(path, tokenizer())

    def test_several_templates_without_a_default(self, tmp_path):
        path = written(tmp_path / "a.jsonl", [{"messages": turns("a", "b")}])
        with pytest.raises(DataError, match="holds conversations, but .* does not say which template to use: "):
            gk.load_dataset(path, tokenizer({"tools": PLAIN, "rag": PLAIN}))
        assert len(gk.load_dataset(path, tokenizer({"tools": MARKED, "default": PLAIN}))) == 1

    def test_template_that_fails(self, tmp_path):
        path = written(tmp_path / "a.jsonl", [{"messages": turns("a", "b")}])
        with pytest.raises(DataError, match=r"line 1: the chat template cannot render the first 2 turns .*: no bots"):
            gk.load_dataset(
                path, tokenizer("{% if messages[-1].role == 'assistant' %}{{ raise_exception('no bots') }}{% endif %}")
            )


class TestInstructions:
    ROWS = [{"instruction": "a", "input": "b", "output": "c d"}, {"instruction": "e", "input": "", "output": "f"}]

    def test_as_chats_where_there_is_a_template(self, tmp_path):
        path = written(tmp_path / "a.jsonl", self.ROWS)
        assert items(gk.load_dataset(path, tokenizer(PLAIN))) == [
            ([USER, A, B, EOS, BOT, C, D, EOS], [X, X, X, X, X, C, D, EOS]),
            ([USER, E, EOS, BOT, F, EOS], [X, X, X, X, F, EOS]),
        ]

    def test_as_prompts_where_there_is_none(self, tmp_path):
        path = written(tmp_path / "a.jsonl", self.ROWS)
        expected = [([A, B, C, D, EOS], [X, X, C, D, EOS]), ([E, F, EOS], [X, F, EOS])]
        assert items(gk.load_dataset(path, tokenizer())) == expected
        rows = [{"instruction": "e", "output": "f", "text": "all of it"}]
        assert items(gk.load_dataset(written(tmp_path / "b.jsonl", rows), tokenizer())) == expected[1:]
