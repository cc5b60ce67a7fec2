"""Ids to text, as it grows."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from runtime.model.tokenizer import CaptionTokenizer
from tests.fakes import MANIFEST

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


def test_a_vocabulary_without_marks_shows_all_at_once(tmp_path):
    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.save(str(tmp_path / "tokenizer.json"))
    found = CaptionTokenizer(tmp_path, MANIFEST)
    assert found.whole_words([1, 5]) == found.text([1, 5]) == "a cat"
