import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<u>' + message['content'] + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<a>' }}{%- endif %}"
)
SPECIAL_TOKENS = ["<eos>", "<u>", "<a>"]
MAX_POSITIONS = 1024


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: any text, exact offsets, nothing to train."""
    vocab = {
        token: i
        for i, token in enumerate(SPECIAL_TOKENS + sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def tiny_model(name: str, vocab_size: int = 264) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": MAX_POSITIONS,
        # Large enough that heads attend sharply and the model does not repeat one token.
        "initializer_range": 0.4,
        "eos_token_id": 0,
        "bos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    if name == "qwen3":
        model: PreTrainedModel = Qwen3ForCausalLM(Qwen3Config(**sizes))
    elif name == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    elif name == "mistral":
        model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=64))
    else:
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(
                **sizes,
                sliding_window=64,
                layer_types=["sliding_attention", "full_attention"],
                query_pre_attn_scalar=8,
            )
        )
    return model.eval()


@pytest.fixture
def qwen3() -> PreTrainedModel:
    return tiny_model("qwen3")


@pytest.fixture(params=["qwen3", "llama", "mistral", "gemma3"])
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)
