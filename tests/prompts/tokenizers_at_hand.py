"""Small tokenizers of the kinds that Llama models have, made offline."""

from tests.conftest import CORPUS

WORDS = [
    *CORPUS,
    "The capital of France is Paris. The capital of Italy is Rome.",
    "Choices: (A) Yes (B) No Answer: (A Yes No a b c",
]
USER_TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def byte_level(llama3: bool = False, **names):
    """Byte-level BPE, split as GPT-2 or as Llama 3 does it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    one = Tokenizer(models.BPE())
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not llama3)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    one.pre_tokenizer = pre_tokenizers.Sequence([split, byte]) if llama3 else byte
    one.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|eot|>"]
    letters = pre_tokenizers.ByteLevel.alphabet()
    one.train_from_iterator(
        WORDS * 3,
        trainers.BpeTrainer(
            vocab_size=500, special_tokens=special, initial_alphabet=letters, show_progress=False
        ),
    )
    if llama3:
        one.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
        )
    tokens = {"bos_token": "<|begin|>", "eos_token": "<|eot|>", **names}
    return PreTrainedTokenizerFast(tokenizer_object=one, **tokens)


def _pieces():
    """A vocabulary with byte fallback, and merges, as SentencePiece's BPE has them."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    one = Tokenizer(models.BPE())
    one.pre_tokenizer = pre_tokenizers.Metaspace()
    one.train_from_iterator(WORDS * 3, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    model = json.loads(one.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    return {name: i for i, name in enumerate(names)}, [tuple(merge) for merge in model["merges"]]


def sentencepiece(legacy: bool):
    """transformers' own Llama tokenizer: Llama 1 and 2, TinyLlama, Vicuna."""
    from transformers import LlamaTokenizer

    vocab, merges = _pieces()
    one = LlamaTokenizer(vocab=vocab, merges=merges, legacy=legacy)
    one.update_post_processor()
    one.add_bos_token = True
    return one


def _piecewise(normalizer, strip: bool, bos: bool):
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    vocab, merges = _pieces()
    one = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True))
    one.add_special_tokens(["<unk>", "<s>", "</s>"])
    one.normalizer = normalizer
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    parts += [decoders.Strip(" ", 1, 0)] if strip else []
    one.decoder = decoders.Sequence(parts)
    if bos:
        one.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=one, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def llama2_file():
    """As Llama 2's own tokenizer.json: a normalizer puts a mark before every piece."""
    from tokenizers import normalizers

    parts = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    return _piecewise(normalizers.Sequence(parts), strip=True, bos=True)


def yi():
    """As Yi's: no mark before a text, no BOS."""
    from tokenizers import normalizers

    return _piecewise(normalizers.Replace(" ", "▁"), strip=False, bos=False)


def unigram():
    """SentencePiece's unigram model, which ends every text with `</s>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    one = Tokenizer(models.Unigram())
    one.pre_tokenizer = pre_tokenizers.Metaspace()
    one.decoder = decoders.Metaspace()
    one.train_from_iterator(
        WORDS * 3,
        trainers.UnigramTrainer(
            vocab_size=150,
            special_tokens=["<unk>", "<s>", "</s>"],
            unk_token="<unk>",
            show_progress=False,
        ),
    )
    one.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=one, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def wordpiece():
    """BERT's kind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    one = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    one.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    one.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    one.train_from_iterator(
        WORDS * 3,
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False),
    )
    one.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=one, bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]"
    )


KINDS = {
    "llama3": lambda: byte_level(llama3=True),
    "gpt2": byte_level,
    "llama-legacy": lambda: sentencepiece(legacy=True),
    "llama": lambda: sentencepiece(legacy=False),
    "llama2-file": llama2_file,
    "yi": yi,
    "unigram": unigram,
    "wordpiece": wordpiece,
}


def small(tokenizer, **changes):
    """A random model of two blocks for a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from interp_steer.model.model import SteeringModel

    settings = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "max_position_embeddings": 512, "initializer_range": 0.2, "eos_token_id": None,
        "bos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    hf = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
    return SteeringModel(hf, tokenizer, "small")
