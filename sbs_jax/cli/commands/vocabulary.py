"""`sbs vocabulary`: cut a vocabulary to the pieces that a task needs."""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sbs_jax.cli import folders


def add(command: Any) -> None:
    vocabulary = command(
        "vocabulary",
        run,
        check=check,
        epilog="example:\n  sbs vocabulary --vocabulary t5/sentencepiece.model --dataset esnli \\\n"
        "      --records_dir records --output vocabularies/esnli\n"
        "  sbs convert --to sbs --cut vocabularies/esnli t5-v1_1-small t5-v1_1-small-esnli\n\n"
        "Kept are all pieces of the training and validation rows, every single character, the pieces of the --text\n"
        "for pre-training, and --reserve frequent pieces; these rows are segmented as before. With --pieces, only the\n"
        "most frequent pieces are kept beside those of the labels. Segmentations that change are counted.",
    )
    vocabulary.add_argument(
        "--vocabulary",
        required=True,
        metavar="FILE",
        help="SentencePiece model, tokenizer.json (BPE) or GGUF file to cut",
    )
    vocabulary.add_argument(
        "--dataset",
        required=True,
        nargs="+",
        metavar="NAME",
        help="datasets whose texts to cover, or folders of sbs init",
    )
    vocabulary.add_argument(
        "--records_dir", metavar="DIR", help="records of the datasets (default for a folder: its records)"
    )
    vocabulary.add_argument(
        "--text", nargs="+", default=[], metavar="FILE", help="text for pre-training to cover: .txt or .jsonl, or .gz"
    )
    vocabulary.add_argument("--augmentation", metavar="FILE", help="records to cover too, as a run's AUGMENTATION")
    vocabulary.add_argument("--pieces", type=int, metavar="N", help="most pieces to keep (default: no limit)")
    vocabulary.add_argument("--reserve", type=int, default=1000, metavar="N", help="further frequent pieces to keep")
    vocabulary.add_argument("--output", required=True, metavar="DIR", help="folder to make")


def _bindings(folder: str, cut: Any) -> str:
    """Returns the bindings of a model with a cut vocabulary; those of a BPE also name its new ids."""
    from sbs_jax.data import vocabularies

    if cut.extra_ids:
        return f"t5.T5Config.vocab_size={cut.vocab_size}"
    pieces = vocabularies.pieces(vocabularies.parse_bpe((Path(folder) / cut.file).read_bytes()))
    found = {"vocab_size": cut.vocab_size, **vocabularies.marks(pieces, eos_id=None, bos_id=None)}
    bindings = " --gin.".join(f"decoder_only.DecoderConfig.{name}={value}" for name, value in found.items())
    return f"{bindings} (of a T5Gemma: t5gemma.T5GemmaConfig)"


def check(arguments: argparse.Namespace) -> None:
    from sbs_jax.cli import early
    from sbs_jax.data import catalogue, records

    folders.fill_in(arguments)
    for name in arguments.dataset:
        records.check_exist(arguments.records_dir, catalogue.get(name).name)
    early.existing(
        "--vocabulary", arguments.vocabulary, "give the path of T5's sentencepiece.model or a tokenizer.json"
    )
    for path in arguments.text:
        early.existing("--text", path, "give .txt or .jsonl files, or .gz of them")


def run(arguments: argparse.Namespace) -> int:
    from sbs_jax.data import corpus, registry, selection, tokens, vocabulary_cut

    def read() -> Iterator[str]:
        return itertools.chain.from_iterable(map(corpus.texts, arguments.text))

    registry.configure(
        selection.DataOptions(
            records_dir=arguments.records_dir,
            vocabulary=tokens.BYTE_VOCABULARY,
            augmentation=arguments.augmentation,
            rationales_per_example="all",
        )
    )
    limit = arguments.pieces
    learned = (selection.TRAIN, selection.VALIDATION)
    datasets = [registry.get(name).name for name in arguments.dataset]
    texts = [text for split in learned for text in registry.texts(datasets, split)]
    cut = vocabulary_cut.write(
        arguments.output,
        arguments.vocabulary,
        texts,
        reserve=arguments.reserve,
        labels=[label for split in learned for label in registry.labels(datasets, split)],
        corpus=read(),
        pieces=limit,
    )
    need = "texts" if limit is None else "labels"
    print(
        f"Pieces: {len(cut.kept):,} of {cut.pieces:,} ({cut.needed:,} that the {need} need, {cut.characters:,} further "
        f"characters, {cut.reserve:,} further frequent pieces)"
    )
    for name, rows in (
        ("Train and validation rows", () if limit is None else texts),
        ("Test rows", registry.texts(datasets, selection.TEST)),
        ("Text", read() if arguments.text else ()),
    ):
        if rows:
            found = vocabulary_cut.coverage(arguments.output, arguments.vocabulary, rows)
            print(
                f"{name}: {found.unknown:,} of {found.tokens:,} tokens unknown; {found.changed:,} of {found.texts:,} "
                "texts segmented differently"
            )
    print(
        f"Train with --gin.VOCABULARY={arguments.output}/{cut.file} and "
        f"--gin.{_bindings(arguments.output, cut)}; cut a checkpoint with sbs convert --cut {arguments.output}"
    )
    return 0
