"""The text that the embedded student is pre-trained on, by span corruption, as a dataset of records.

Three kinds of passages, none with a question, an answer or a task prefix:

    Iron sinks. March is mild. Bell makes noise.                          (general facts, 30 %)
    A tiny red iron lamp, found in the garden in March by the baker.      (a description, 20 %)
    A tiny red iron lamp, found in .. by the baker. Iron sinks. ..        (both, 50 %)

A row is a passage with words replaced by sentinels, and its label is what they replaced (T5, arXiv 1910.10683,
section 3.1.4), so that the ordinary trainer, given the task `builtin_corpus_label`, pre-trains. One half of the rows
loses short spans, the other one sentence or all from one sentence on (the sequential denoising of UL2, arXiv
2205.05131). `scripts/pretrain_student.py` makes the rows and runs the training.
"""

from __future__ import annotations

import collections
import io
import itertools
import math
import random
import re
import string
from collections.abc import Iterator, Sequence

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from sbs_jax.datasets import Dataset
from tasks.builtin import PROPERTIES, QUESTIONS, description, random_problem, random_thing
from tasks.metrics import accuracy, same_text

NAME = "builtin_corpus"
# Of short spans: the shares of words that are masked (one is drawn per row), and their mean length in words.
DENSITIES = (0.1, 0.15, 0.25)
MEAN_SPAN = 2.0
# Texts of each kind that the vocabulary is made from, and the score of a piece that is one character.
VOCABULARY_ROWS = 4000
SPELLED = -20.0
# Longest masked end, in words.
LONGEST_END = 17


def passage(random_: random.Random) -> str:
    """One passage of the three kinds."""
    kind = random_.choices(("facts", "description", "both"), weights=(30, 20, 50))[0]
    if kind == "facts":
        return " ".join(
            question.fact(random_.choice(PROPERTIES[question.about])) for question in random_.sample(QUESTIONS, 3)
        )
    thing, order = random_thing(random_)
    text = description(thing, order=order)
    if kind == "both":
        text += "".join(" " + question.fact(thing[question.about]) for question in random_.sample(QUESTIONS, 2))
    return text


def masked(text: str, random_: random.Random) -> tuple[str, str]:
    """(inputs, targets) of one row.

    "A red lamp, found in the garden. Red stands out." may become

        ("A <extra_id_0> lamp, found in <extra_id_1>. Red stands out.", "<extra_id_0> red <extra_id_1> the garden")
        ("A red lamp, found in the garden. <extra_id_0>", "<extra_id_0> Red stands out.")
    """
    words = re.findall(r"\w+|[^\w\s]", text)
    spans = _short_spans(len(words), random_) if random_.random() < 0.5 else [_end(words, random_)]
    inputs: list[str] = []
    targets: list[str] = []
    position = 0
    for number, (start, stop) in enumerate(spans):
        sentinel = f"<extra_id_{number}>"
        inputs += [*words[position:start], sentinel]
        targets += [sentinel, *words[start:stop]]
        position = stop
    return _joined(inputs + words[position:]), _joined(targets)


def rows(*, seed: int) -> Iterator[tuple[str, str]]:
    """Endless (inputs, targets), fixed by the seed."""
    random_ = random.Random(seed)
    while True:
        yield masked(passage(random_), random_)


def vocabulary(*, seed: int) -> bytes:
    """A SentencePiece model whose pieces are the words of the project's text, upper and lower case alike.

    Other words are spelled, so that no text of letters, digits and common signs is unknown. SentencePiece's own
    training prefers parts of words here (it keeps few whole ones of so small a text), so the pieces are set after it.
    """
    random_ = random.Random(seed)
    texts = ["predict: explain: yes no Answer:"] * 100
    for _ in range(VOCABULARY_ROWS):
        texts += [passage(random_), random_problem(random_).text]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=written,
        vocab_size=200,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc_cf",  # "cf" folds case
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    # The class is made when its module is imported, which pyright does not see.
    proto = sentencepiece_model_pb2.ModelProto  # pyright: ignore[reportAttributeAccessIssue]
    model = proto.FromString(written.getvalue())
    counts = collections.Counter(word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower()))
    del model.pieces[3:]  # <pad>, </s> and <unk> stay
    for word, count in counts.most_common():
        score = math.log(count / counts.total())
        model.pieces.add(piece=f"▁{word}" if word.isalpha() else word, score=score)
    spelled = {*"▁", *string.ascii_lowercase, *string.digits, *string.punctuation}
    for character in sorted(spelled - {word for word in counts if not word.isalpha()}):
        model.pieces.add(piece=character, score=SPELLED)
    model.trainer_spec.vocab_size = len(model.pieces)
    return model.SerializeToString(deterministic=True)


def _short_spans(length: int, random_: random.Random) -> list[tuple[int, int]]:
    """Disjoint spans, at least one word apart, that cover a share of `length` words; T5's uniform segmentation."""
    covered = max(1, round(length * random_.choice(DENSITIES)))
    count = max(1, round(covered / MEAN_SPAN))
    sizes, gaps = _cut(covered, count, random_), _cut(length - covered, count, random_)
    begins_masked = random_.random() < 0.5
    spans, position = [], 0
    for size, gap in zip(sizes, gaps, strict=True):
        start = position if begins_masked else position + gap
        spans.append((start, start + size))
        position += size + gap
    return spans


def _cut(total: int, parts: int, random_: random.Random) -> list[int]:
    """Random whole numbers of at least 1 that sum to `total`."""
    points = [0, *sorted(random_.sample(range(1, total), parts - 1)), total]
    return [stop - start for start, stop in itertools.pairwise(points)]


def _end(words: Sequence[str], random_: random.Random) -> tuple[int, int]:
    """A sentence after the first, or all from one on; of a single sentence, what follows a random word."""
    starts = [index + 1 for index, word in enumerate(words[:-1]) if word == "."]
    start = random_.choice(starts) if starts else random_.randrange(max(1, len(words) - 12), len(words) - 1)
    stop = len(words)
    if random_.random() < 0.5:
        stop = words.index(".", start) + 1
    return start, min(stop, start + LONGEST_END)


def _joined(words: Sequence[str]) -> str:
    return re.sub(r" ([.,])", r"\1", " ".join(words))


DATASET = Dataset(
    name=NAME,
    labels=None,
    read_release=None,
    parsers={},
    metric_fns=(accuracy,),
    primary_metric="accuracy",
    same_label=same_text,
    feature_lengths={"inputs": 32, "targets": 24},
)
