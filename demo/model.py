"""The demo model's shape and its tokenizer, in the classes that every GIT checkpoint uses."""

from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    PreTrainedTokenizerFast,
)

from demo import grammar

IMAGE_SIZE = 128  # pixels
PATCH_SIZE = 16  # pixels
MAX_POSITIONS = 64  # text tokens, prompt included
FOLDER = Path(__file__).parent / "model"

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def build_config(vocabulary_size: int) -> GitConfig:
    """About 5 M parameters: a ViT of 6 layers and a text decoder of 4, both 192 wide."""
    vision = {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    }
    return GitConfig(
        vision_config=vision,
        vocab_size=vocabulary_size,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=MAX_POSITIONS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=_SPECIAL.index("[PAD]"),
        bos_token_id=_SPECIAL.index("[CLS]"),
        eos_token_id=_SPECIAL.index("[SEP]"),
    )


def build_processor() -> GitProcessor:
    """Word-level tokenizer over the grammar's vocabulary, and CLIP's preprocessing at 128 px."""
    words = [*_SPECIAL, *grammar.vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    # People end a question with a mark; the grammar has none.
    marks = normalizers.Replace(Regex("[?!.,]"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), marks])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=MAX_POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
    )
    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return GitProcessor(image_processor=images, tokenizer=fast)


def build_model(vocabulary_size: int) -> GitForCausalLM:
    """The model with fresh weights; seed torch first to get the same ones again."""
    return GitForCausalLM(build_config(vocabulary_size))
