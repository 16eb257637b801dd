"""Pre-training text of the embedded student, for span corruption, as a dataset of records.

There are two kinds of passages, without questions, answers or task prefixes: general facts, or a description with facts
that are true of it.

    Iron sinks. March is mild. Bell makes noise.
    A tiny red iron lamp, found in the garden in March by the baker. Iron sinks. Tiny fits a pocket. Baker wakes early.

A row's input is a passage with spans of words replaced by sentinels; its label has the replaced words (T5, arXiv
1910.10683, section 3.1.4). The ordinary trainer pre-trains on the task `builtin_corpus_label`. In most facts the
subject, the rest or the whole is masked: such salient spans (REALM, arXiv 2002.08909, section 3.4) teach the student to
look up a fact's subject in the description, which random spans did not (docs/experiments.md).
`scripts/pretrain_student.py` makes the rows and runs the training.
"""

from __future__ import annotations

import collections
import io
import math
import random
import re
import string
from collections.abc import Iterator, Sequence

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from sbs_jax.data.dataset import of_text
from tasks.builtin import PROPERTIES, QUESTIONS, description, random_problem, random_thing

NAME = "builtin_corpus"
# Share of passages with facts only, facts per passage, and the shares of facts and of descriptions that are masked.
FACTS_ALONE = 0.25
FACTS = 3
MASKED_FACTS = 0.75
MASKED_DESCRIPTIONS = 0.25
# Number of texts of each kind to build the vocabulary from, and the score of a one-character piece.
VOCABULARY_ROWS = 4000
SPELLED = -20.0


def passage(random_: random.Random) -> list[str]:
    """Draws the sentences of one passage: facts, or a description and facts that are true of it."""
    questions = random_.sample(QUESTIONS, FACTS)
    if random_.random() < FACTS_ALONE:
        return [question.fact(random_.choice(PROPERTIES[question.about])) for question in questions]
    thing, order = random_thing(random_)
    return [description(thing, order=order), *(question.fact(thing[question.about]) for question in questions)]


def masked(sentences: Sequence[str], random_: random.Random) -> tuple[str, str]:
    """Returns (inputs, targets) of one row; masks at most one span per sentence, and at least one in all.

    ["A red lamp, found in the garden.", "Red stands out.", "Lamp gives light."] may become

        ("A red lamp, found in the garden. <extra_id_0> stands out. Lamp <extra_id_1>",
         "<extra_id_0> Red <extra_id_1> gives light.")
    """
    spans = [_span(sentence, random_) for sentence in sentences]
    if not any(spans):
        spans[-1] = (0, len(words(sentences[-1])))
    inputs: list[str] = []
    targets: list[str] = []
    sentinels = 0
    for sentence, span in zip(sentences, spans, strict=True):
        pieces = words(sentence)
        if span is not None:
            sentinel = f"<extra_id_{sentinels}>"
            targets += [sentinel, *pieces[slice(*span)]]
            pieces[slice(*span)] = [sentinel]
            sentinels += 1
        inputs += pieces
    return _joined(inputs), _joined(targets)


def words(text: str) -> list[str]:
    """Splits a text into words and punctuation marks."""
    return re.findall(r"\w+|[^\w\s]", text)


def rows(*, seed: int) -> Iterator[tuple[str, str]]:
    """Yields (inputs, targets) endlessly; the seed fixes them."""
    random_ = random.Random(seed)
    while True:
        yield masked(passage(random_), random_)


def vocabulary(*, seed: int) -> bytes:
    """Builds a SentencePiece model whose pieces are the words of the project's text; it ignores case.

    Other words are spelled in characters, so that letters, digits and common signs are never unknown. SentencePiece's
    own training keeps few whole words of so small a text, so the pieces are replaced afterwards.
    """
    random_ = random.Random(seed)
    texts = ["predict: explain: yes no Answer:"] * 100
    for _ in range(VOCABULARY_ROWS):
        texts += [" ".join(passage(random_)), random_problem(random_).text]
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
    # protobuf makes this class at import, which pyright does not see.
    proto = sentencepiece_model_pb2.ModelProto  # pyright: ignore[reportAttributeAccessIssue]
    model = proto.FromString(written.getvalue())
    counts = collections.Counter(word for text in texts for word in words(text.lower()))
    del model.pieces[3:]  # <pad>, </s> and <unk> stay
    for word, count in counts.most_common():
        score = math.log(count / counts.total())
        model.pieces.add(piece=f"▁{word}" if word.isalpha() else word, score=score)
    spelled = {*"▁", *string.ascii_lowercase, *string.digits, *string.punctuation}
    for character in sorted(spelled - {word for word in counts if not word.isalpha()}):
        model.pieces.add(piece=character, score=SPELLED)
    model.trainer_spec.vocab_size = len(model.pieces)
    return model.SerializeToString(deterministic=True)


def _span(sentence: str, random_: random.Random) -> tuple[int, int] | None:
    """Draws the span to mask: the subject, the rest or all of a fact; one or two words of a description."""
    length = len(words(sentence))
    if "," in sentence:
        if random_.random() >= MASKED_DESCRIPTIONS:
            return None
        start = random_.randrange(1, length - 2)
        return start, start + random_.choice((1, 2))
    if random_.random() >= MASKED_FACTS:
        return None
    return random_.choice(((0, 1), (1, length), (0, length)))


def _joined(words: Sequence[str]) -> str:
    return re.sub(r" ([.,])", r"\1", " ".join(words))


DATASET = of_text(NAME, lengths={"inputs": 40, "targets": 24})
