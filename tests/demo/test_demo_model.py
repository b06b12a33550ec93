import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from headlong.demo.evaluate import complete, count_chat_tokens, evaluate, render_chat
from headlong.demo.paths import MODEL_DIR
from headlong.profiling.lexicon import NAMES, PHRASE_WORDS


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)


def test_the_directory_is_small_and_complete() -> None:
    assert sum(path.stat().st_size for path in MODEL_DIR.rglob("*")) <= 16_000_000
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        assert (MODEL_DIR / name).is_file()
    assert not (MODEL_DIR / "training.pt").exists()


def test_the_architecture_has_many_kv_heads_and_a_long_context(model: PreTrainedModel) -> None:
    config = model.config
    assert config.architectures == ["Qwen3ForCausalLM"]
    assert config.num_attention_heads > config.num_key_value_heads
    assert config.num_hidden_layers * config.num_key_value_heads >= 16
    assert config.max_position_embeddings >= 8192
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@given(st.text(max_size=60))
def test_any_text_round_trips(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


def test_a_name_stands_directly_before_its_value(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode(" code Alice 482137.")
    pieces = [tokenizer.decode([i]) for i in ids]
    assert pieces == [" code", " Alice", " 48", "21", "37", "."]
    for word in (*NAMES, *PHRASE_WORDS):
        assert len(tokenizer.encode(f" {word}")) == 1, word


def test_the_chat_template_renders_roles(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = render_chat(tokenizer, messages)
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
    assert count_chat_tokens(tokenizer, "Hello") > len(tokenizer.encode("Hello"))


def test_generation_ends_with_the_turn(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    messages = [
        {
            "role": "user",
            "content": "The access code Alice 4821. The door code Henry 7135.\n"
            "What is the access code Alice?",
        }
    ]
    text = complete(model, tokenizer, render_chat(tokenizer, messages))
    assert text == "The access code Alice 4821."


def test_short_needles_are_found(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    accuracy, failures = evaluate(model, tokenizer, context_tokens=512, num_prompts=12, seed=1)
    assert accuracy.chat >= 11 / 12, failures
    assert accuracy.completion >= 11 / 12, failures
