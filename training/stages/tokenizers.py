"""Stage "tokenizers": flux-nano's own tokenizers, sentencepiece for T5 and byte-pair merges for CLIP.

Both lower-case the text and have one token for each known word. An unknown word is spelled in letters, and
training teaches the model to ignore it. The files have the layout that transformers reads for the real
encoders, so that the same code loads both.
"""

import json
import random
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

from training.scenes.compose import sample
from training.scenes.vocabulary import all_words

T5_LENGTH, CLIP_LENGTH = 40, 40
T5_PIECES = 400  # an upper bound
PADDING, END, UNKNOWN = 0, 1, 2
_CORPUS = 20_000

# Arguments: text, model to write, number of pieces. Prints the pieces with their scores.
_TRAIN_PIECES = """
import io, json, sys
import sentencepiece
text, model, size = sys.argv[1:]
written = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(open(text).read().splitlines()), model_writer=written, model_type="unigram",
    vocab_size=int(size), hard_vocab_limit=False, normalization_rule_name="nmt_nfkc_cf",
    character_coverage=1.0, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2)
open(model, "wb").write(written.getvalue())
pieces = sentencepiece.SentencePieceProcessor(model_file=model)
print(json.dumps([(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))]))
"""


def write_tokenizers(folder: Path) -> None:
    """Write `folder`/tokenizer_2 (T5) and `folder`/tokenizer (CLIP), the same files every time."""
    rng = random.Random(7)
    captions = [sample(rng).caption for _ in range(_CORPUS)]
    words = all_words()
    _write_t5(folder / "tokenizer_2", captions, words)
    _write_clip(folder / "tokenizer", words)


def _write_t5(folder: Path, captions: list[str], words: list[str]) -> None:
    # Every word is there often enough to become a piece, and every letter, so that anything can be spelled.
    letters = [" ".join("abcdefghijklmnopqrstuvwxyz0123456789,.'!?-")] * 50
    folder.mkdir(parents=True, exist_ok=True)
    corpus, model = folder / "corpus.txt", folder / "spiece.model"
    corpus.write_text("\n".join(captions + words * 400 + letters) + "\n")
    # In a separate process: beside other native libraries, the trainer may never return.
    found = subprocess.run(
        [sys.executable, "-c", _TRAIN_PIECES, str(corpus), str(model), str(T5_PIECES)],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    # tokenizer.json says all that this file does, but for Unicode's rules, which are 250 kB.
    corpus.unlink()
    model.unlink()
    _fast_t5([(piece, score) for piece, score in json.loads(found.stdout)]).save_pretrained(folder)
    # Every release of transformers knows this name. Newer ones write another, which older ones do not know.
    config = folder / "tokenizer_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2)
    )


def _fast_t5(pieces: list[tuple[str, float]]):
    """Turn the sentencepiece model into a tokenizer that needs neither sentencepiece nor protobuf."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=T5_LENGTH,
        split_special_tokens=True,
    )


def _write_clip(folder: Path, words: list[str]) -> None:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    merges = _learn_merges(words)
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(merge) for merge in merges]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    ids = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False))
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(merge) for merge in merges) + "\n"
    )
    CLIPTokenizer.from_pretrained(folder, model_max_length=CLIP_LENGTH).save_pretrained(folder)


def _learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Learn byte-pair merges (arXiv 1508.07909) until every word is one token. Ties go by the alphabet.

    CLIP splits off digits before it merges, so words with digits stay in parts.
    """
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words if word.isalpha()]
    merges = []
    while True:
        counts = Counter(pair for word in spelled for pair in pairwise(word))
        if not counts:
            return merges
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for word in spelled:
            for place in range(len(word) - 2, -1, -1):
                if tuple(word[place : place + 2]) == best:
                    word[place : place + 2] = ["".join(best)]
