"""Completions that follow a structure, and tokenizers of other kinds."""

import string

import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from headlong.server.engine.engine import Engine
from headlong.server.engine.outputs import RequestOutput
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sampler import sample
from headlong.server.engine.sampling_params import SamplingParams, Structure
from headlong.server.engine.structured import StructureCompiler
from support.sequences import make_sequence

TIMEOUT_S = 120


def byte_fallback_tokenizer() -> PreTrainedTokenizerBase:
    """As Llama 2's: pieces with a lower line for a space, and a token for each other byte."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *string.ascii_letters, *string.digits, *'{}[]:,.-"']
    merges = [("▁", "t"), ("▁t", "h"), ("t", "h"), ("e", "r"), ('"', ":"), ("t", "r")]
    pieces += ["".join(pair) for pair in merges]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


class Writer:
    """Writes completions of random logits under a structure, without an engine."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        extra_vocab: int = 0,
        eos_token_ids: frozenset[int] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer) + extra_vocab
        own = frozenset({tokenizer.eos_token_id})
        self.eos_token_ids = own if eos_token_ids is None else eos_token_ids
        self.compiler = StructureCompiler(tokenizer, self.vocab_size, self.eos_token_ids)

    def write(
        self, structure: Structure, seed: int = 0, *, begin: str = "", **params: object
    ) -> tuple[str, str]:
        """The text of a completion that begins as said, and why it ended."""
        settings = {"max_tokens": 400, "seed": seed, "structure": structure} | params
        asked = SamplingParams(**settings)  # type: ignore[arg-type]
        sequence = make_sequence(EngineRequest("r", (3,), asked), self.tokenizer)
        compiled = self.compiler.submit(structure).result(TIMEOUT_S)
        sequence.matcher = compiled.matcher()
        generator = torch.Generator().manual_seed(seed)
        text = ""
        forced = self.tokenizer.encode(begin, add_special_tokens=False)
        while not sequence.finished:
            logits = 2 * torch.randn(1, self.vocab_size, generator=generator)
            if forced:
                logits[0, forced[0]] = torch.inf
            (token,) = sample(logits, [sequence], self.eos_token_ids)
            assert not forced or token.token_id == forced.pop(0)
            text += sequence.append(token.token_id, self.eos_token_ids)
        assert sequence.finish_reason is not None
        return text, sequence.finish_reason


def serve(engine: Engine, asked: dict[str, SamplingParams]) -> dict[str, list[RequestOutput]]:
    """Runs named requests together to their ends."""
    outputs: dict[str, list[RequestOutput]] = {name: [] for name in asked}
    for name, params in asked.items():
        engine.add_request(EngineRequest(name, [3, 4, 5], params))
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
        engine.cache.check_integrity()
    assert engine.cache.owned_blocks == (0,) * len(engine.groups)
    return outputs


def text_of(outputs: list[RequestOutput]) -> str:
    return "".join(output.text for output in outputs)
