"""`sbs vocabulary`: cut a vocabulary to the pieces that a task needs."""

import argparse
from typing import Any


def add(command: Any) -> None:
    vocabulary = command(
        "vocabulary",
        run,
        "Cut a SentencePiece model to the pieces that the records need, so that a student's tables get small.",
        epilog="example:\n  sbs vocabulary --vocabulary t5/sentencepiece.model --dataset esnli \\\n"
        "      --records_dir records --output vocabularies/esnli\n"
        "  sbs convert --to sbs --cut vocabularies/esnli t5-v1_1-small t5-v1_1-small-esnli\n\n"
        "Kept are all pieces of the training and validation rows, every single character, and --reserve frequent\n"
        "pieces. The texts of these rows are segmented as before; what changes in the test rows is counted.",
    )
    vocabulary.add_argument("--vocabulary", required=True, metavar="FILE", help="SentencePiece model to cut")
    vocabulary.add_argument("--dataset", required=True, nargs="+", metavar="NAME", help="datasets whose texts to cover")
    vocabulary.add_argument("--records_dir", required=True, metavar="DIR", help="records of the datasets")
    vocabulary.add_argument(
        "--reserve", type=int, default=1000, metavar="N", help="further frequent pieces to keep (default: %(default)s)"
    )
    vocabulary.add_argument("--output", required=True, metavar="DIR", help="folder to make")


def run(arguments: argparse.Namespace) -> int:
    from sbs_jax.data import registry, selection, tokens, vocabulary_cut

    registry.configure(selection.DataOptions(records_dir=arguments.records_dir, vocabulary=tokens.BYTE_VOCABULARY))
    texts = {split: registry.texts(arguments.dataset, split) for split in (selection.TRAIN, selection.VALIDATION)}
    cut = vocabulary_cut.write(
        arguments.output,
        arguments.vocabulary,
        [text for found in texts.values() for text in found],
        reserve=arguments.reserve,
    )
    print(
        f"Pieces: {len(cut.kept):,} of {cut.pieces:,} ({cut.needed:,} that the texts need, {cut.characters:,} further "
        f"characters, {cut.reserve:,} in reserve)"
    )
    test = registry.texts(arguments.dataset, selection.TEST)
    if test:
        found = vocabulary_cut.coverage(arguments.output, arguments.vocabulary, test)
        print(
            f"Test rows: {found.unknown:,} of {found.tokens:,} tokens unknown; {found.changed:,} of {found.texts:,} "
            "texts segmented differently"
        )
    print(
        f"Train with --gin.VOCABULARY={arguments.output}/{vocabulary_cut.MODEL} and "
        f"--gin.t5.T5Config.vocab_size={cut.vocab_size}; cut a checkpoint with "
        f"sbs convert --cut {arguments.output}"
    )
    return 0
