"""Build the two tokenizers; both lower-case their input, also after saving and loading."""

from __future__ import annotations

import io
import json
import string
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from transformers import CLIPTokenizer, T5TokenizerFast

from flexclear.compile.files import whole_file
from flexclear.embedded.captions import split_words

CLIP_LENGTH = 77
_END_OF_WORD = "</w>"
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def build_clip_tokenizer(captions: Sequence[str]) -> CLIPTokenizer:
    """Return a byte-level BPE tokenizer in which every word of the captions is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    words = _words_by_frequency(captions)
    trained = Tokenizer(models.BPE(end_of_word_suffix=_END_OF_WORD))
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trained.train_from_iterator(
        words * 2,
        trainers.BpeTrainer(vocab_size=4096, end_of_word_suffix=_END_OF_WORD, show_progress=False),
    )
    pairs = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys(alphabet + [letter + _END_OF_WORD for letter in alphabet])
    tokens.update(dict.fromkeys(left + right for left, right in pairs))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    vocabulary["<|startoftext|>"] = len(vocabulary)
    vocabulary["<|endoftext|>"] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=CLIP_LENGTH)


def kept_clip_tokenizer(file: Path, captions: Sequence[str]) -> CLIPTokenizer:
    """Return the CLIP tokenizer in ``file``. The first call builds it and writes the file.

    BPE training breaks ties between equally frequent pairs at random, so a second build may number some pieces differently. A
    resumed run and its export must use the first one.
    """
    if not file.is_file():
        keep_clip_tokenizer(file, build_clip_tokenizer(captions))
    kept = json.loads(file.read_text(encoding="utf-8"))
    merges = [tuple(pair) for pair in kept["merges"]]
    return CLIPTokenizer(vocab=kept["vocab"], merges=merges, model_max_length=CLIP_LENGTH)


def keep_clip_tokenizer(file: Path, tokenizer: CLIPTokenizer) -> None:
    """Write what :func:`kept_clip_tokenizer` reads back."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    with whole_file(file) as beside:
        beside.write_text(json.dumps({key: model[key] for key in ("vocab", "merges")}), encoding="utf-8")


def build_t5_tokenizer(captions: Sequence[str]) -> T5TokenizerFast:
    """Return a unigram tokenizer: one piece per word of the captions, and letters for spelling other words."""
    words = _words_by_frequency(captions)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(_SPACE + word, -3.0) for word in words]
    pieces += [(mark, -4.0) for mark in ",."]
    pieces += [(_SPACE, -9.0)]
    pieces += [(letter, -12.0) for letter in string.ascii_lowercase + string.digits]
    return T5TokenizerFast(
        vocab=pieces, extra_ids=0, model_max_length=512, _spm_precompiled_charsmap=_lower_casing_map()
    )


def _words_by_frequency(captions: Sequence[str]) -> list[str]:
    counts = Counter(word for text in captions for word in split_words(text))
    return sorted(counts, key=lambda word: (-counts[word], word))


def _lower_casing_map() -> bytes:
    """Return SentencePiece's compiled form of the rule "A to a, ..., Z to z".

    A T5 tokenizer is rebuilt when it is loaded and keeps only a normalizer of this kind.
    """
    from sentencepiece import SentencePieceTrainer
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    rules = "".join(f"{ord(letter.upper()):x}\t{ord(letter):x}\n" for letter in string.ascii_lowercase)
    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rules.tsv"
        path.write_text(rules, encoding="ascii")
        SentencePieceTrainer.train(
            sentence_iterator=iter([string.ascii_lowercase] * 4),
            model_writer=model,
            model_type="char",
            vocab_size=32,
            hard_vocab_limit=False,
            normalization_rule_tsv=str(path),
            minloglevel=2,
        )
    proto = ModelProto()
    proto.ParseFromString(model.getvalue())
    return proto.normalizer_spec.precompiled_charsmap
