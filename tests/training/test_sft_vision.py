"""GEKOSFTTrainer with vision models, whose rows SFT's collator prepares anew in each batch."""

from __future__ import annotations

import pytest
import torch
from test_sft import PLAIN, tokenizer
from training import weights

import geko_kernels as gk

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
Image = pytest.importorskip("PIL.Image")
UNIFORM = gk.GEKOConfig.uniform()
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE {% else %}{{ c['text'] }} w1 "
    "{% endif %}{% endfor %}{% endfor %}"
)


def llava():
    import transformers as T

    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image = words.convert_tokens_to_ids("<image>")
    size = {"height": 8, "width": 8}
    processor = T.LlavaProcessor(
        image_processor=T.CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=size),
        tokenizer=words,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = T.CLIPVisionConfig(**shape, image_size=8, patch_size=4)
    text = T.LlamaConfig(**shape, vocab_size=40, num_key_value_heads=2)
    torch.manual_seed(0)
    config = T.LlavaConfig(vision_config=vision, text_config=text, image_token_id=image, image_seq_length=4)
    return T.LlavaForConditionalGeneration(config), processor


def qwen():
    """Its images are patches end to end, of all rows together."""
    import transformers as T

    words = tokenizer()
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words.add_special_tokens({"additional_special_tokens": special})
    start, end, image, video = words.convert_tokens_to_ids(special)

    class Pictures(T.Qwen2VLProcessor):  # a processor of videos needs torchvision
        def check_argument_for_proper_class(self, argument_name, argument):
            return type(argument)

    processor = Pictures(
        image_processor=T.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=64),
        tokenizer=words,
        video_processor=None,
        chat_template=TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {**shape, "vocab_size": 40, "num_key_value_heads": 2, "rope_parameters": rope}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "mlp_ratio": 1}
    ids = {"image_token_id": image, "video_token_id": video, "vision_start_token_id": start, "vision_end_token_id": end}
    torch.manual_seed(0)
    return T.Qwen2VLForConditionalGeneration(T.Qwen2VLConfig(text_config=text, vision_config=vision, **ids)), processor


MODELS = {"llava": llava, "qwen": qwen}


def pictures(kind="prompt", number=12):
    talks = [
        ([{"role": "user", "content": f"w{i} w4"}], [{"role": "assistant", "content": f"w{i % 7} w5 w{i % 3}"}])
        for i in range(number)
    ]
    images = [[Image.new("RGB", (8, 8), (20 * i % 256, i % 256, 0))] for i in range(number)]
    if kind == "prompt":
        columns = {"prompt": [p for p, _ in talks], "completion": [c for _, c in talks]}
    else:
        columns = {"messages": [[*p, *c] for p, c in talks]}
    return datasets.Dataset.from_dict({**columns, "images": images}).cast_column(
        "images", datasets.List(datasets.Image())
    )


def trainer_of(cls, folder, name, data, **fields):
    named = {name: fields.pop(name) for name in ("config", "eval_dataset") if name in fields}
    settings = {
        "max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "bf16": False, "save_strategy": "no", "train_sampling_strategy": "sequential", "learning_rate": 0.1,
        "gradient_checkpointing": False, "optim": "sgd", "disable_tqdm": True, "max_length": None, **fields,
    }  # fmt: skip
    model, processor = MODELS[name]()
    args = trl.SFTConfig(output_dir=str(folder), **settings)
    return cls(model=model, args=args, train_dataset=data, processing_class=processor, **named)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["prompt", "chat"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_uniform_trains_as_sft_does(tmp_path, name, kind, accumulation):
    fields = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation}
    runs = []
    for cls, more in ((trl.SFTTrainer, {}), (gk.GEKOSFTTrainer, {"config": UNIFORM})):
        more["eval_dataset"] = pictures(kind, 5)
        trainer = trainer_of(cls, tmp_path / cls.__name__, name, pictures(kind), **fields, **more)
        trainer.train()
        keys = ("loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm")
        curves = [entry[key] for key in keys for entry in trainer.state.log_history if key in entry]
        runs.append((curves, weights(trainer.model), trainer.evaluate()["eval_loss"]))
    assert len(runs[0][0]) == 15 and runs[1][0] == pytest.approx(runs[0][0], rel=1e-4)
    torch.testing.assert_close(runs[1][1], runs[0][1], rtol=1e-4, atol=1e-6)
    assert runs[1][2] == pytest.approx(runs[0][2], rel=1e-4)
    assert trainer._found.head is not None and trainer.sample_state.times_seen.tolist() == [1] * 12


@pytest.mark.parametrize("name", MODELS)
def test_frozen_rows_are_left_out(tmp_path, name):
    fields = {"max_steps": -1, "num_train_epochs": 2, "config": gk.GEKOConfig(**PLAIN)}
    trainer = trainer_of(gk.GEKOSFTTrainer, tmp_path, name, pictures(), **fields)
    state = trainer.sample_state
    state.times_seen[:4], state.bucket[:4], state.confidence[:4] = 1, 0, 0.99
    trainer.train()
    assert state.times_seen.tolist() == [1] * 4 + [2] * 8


def test_resuming_is_exact(tmp_path):
    """Though the checkpoint's file has other names for the weights."""
    fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole, again = (trainer_of(gk.GEKOSFTTrainer, tmp_path, "llava", pictures(), **fields) for _ in range(2))
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights(again.model), weights(whole.model))


def test_sample_weights_of_the_rows(tmp_path):
    data = pictures()
    twos = data.add_column("sample_weights", [2.0] * 12)
    losses = []
    for folder, some in (("plain", data), ("twos", twos)):
        trainer = trainer_of(gk.GEKOSFTTrainer, tmp_path / folder, "llava", some, config=UNIFORM, max_steps=1)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-5)


def test_text_alone(tmp_path):
    """A vision model may be trained on text: SFT prepares its rows as any others."""
    data = datasets.Dataset.from_dict({"text": [f"w{i} w4 w5" for i in range(12)]})
    trainer = trainer_of(gk.GEKOSFTTrainer, tmp_path, "llava", data, config=UNIFORM)
    trainer.train()
    assert trainer.sample_state.times_seen.tolist() == [1] * 12


def test_batches_by_tokens_are_refused(tmp_path):
    config = gk.GEKOConfig.uniform(batch_tokens=64)
    with pytest.raises(ValueError, match="input_ids"):
        trainer_of(gk.GEKOSFTTrainer, tmp_path, "llava", pictures(), config=config).train()
