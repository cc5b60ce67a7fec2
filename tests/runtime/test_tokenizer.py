"""Ids to text, as it grows."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, BertTokenizerFast

from export.tokenizer import tokenizer_json
from runtime.model.tokenizer import CaptionTokenizer
from tests.support.fakes import MANIFEST

WORDS = ["[UNK]", "a", "un", "##happi", "##ness", "cat", ",", "##s"]


@pytest.fixture
def tokenizer(tmp_path):
    pieces = Tokenizer(models.WordPiece({w: n for n, w in enumerate(WORDS)}, unk_token="[UNK]"))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    pieces.save(str(tmp_path / "tokenizer.json"))
    return CaptionTokenizer(tmp_path, MANIFEST)


def test_only_whole_words_are_shown_while_a_text_grows(tokenizer):
    ids = [WORDS.index(word) for word in ("a", "cat", "##s", ",", "un", "##happi", "##ness")]
    shown = [tokenizer.whole_words(ids[: count + 1]) for count in range(len(ids))]
    assert shown == ["", "a", "a", "a cats", "a cats,", "a cats,", "a cats,"]
    assert tokenizer.text(ids) == "a cats, unhappiness"


def test_a_text_that_goes_on_with_the_prompts_last_word_shows_no_mark(tokenizer):
    ids = [WORDS.index(word) for word in ("##ness", "cat")]
    assert tokenizer.text(ids) == "ness cat"
    assert "#" not in "".join(tokenizer.whole_words(ids[:count]) for count in range(3))


def bert(folder, **settings):
    """A checkpoint's tokenizer as those of microsoft/git-* are: BERT's, with a word list only."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "man", "n", "t", "s", "m", "re",
             "hat", "'", ".", ",", "!", "is", "##n", "##s", "\""]  # fmt: skip
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt"), **settings).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "git"}')
    (folder / "tokenizer.json").unlink()
    theirs = AutoTokenizer.from_pretrained(folder)
    written = tokenizer_json(str(folder), None, len(words))
    (folder / "tokenizer.json").write_text(written)
    return theirs, CaptionTokenizer(folder, MANIFEST), len(words)


@pytest.mark.parametrize("settings", [{}, {"clean_up_tokenization_spaces": False}])
def test_text_is_that_of_hugging_face_and_grows_by_its_end(tmp_path, settings):
    theirs, ours, count = bert(tmp_path, **settings)
    said = ours.text(theirs("the man's hat isn't", add_special_tokens=False).input_ids)
    assert ("man's" in said) is (not settings)
    rng = random.Random(0)
    for _ in range(3000):
        ids = [rng.randrange(5, count) for _ in range(rng.randint(1, 12))]
        text = ours.text(ids)
        assert text == theirs.decode(ids, skip_special_tokens=True).strip().removeprefix("##")
        shown = ""
        for end in range(len(ids) + 1):
            longer = ours.whole_words(ids[:end])
            assert longer.startswith(shown), (text, shown, longer)
            shown = longer
        assert text.startswith(shown)


def test_a_vocabulary_without_marks_shows_all_at_once(tmp_path):
    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.save(str(tmp_path / "tokenizer.json"))
    found = CaptionTokenizer(tmp_path, MANIFEST)
    assert found.whole_words([1, 5]) == found.text([1, 5]) == "a cat"
