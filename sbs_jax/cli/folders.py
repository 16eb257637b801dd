"""Fills in what a dataset's folder (data/dataset_folder.py) implies for a command's other arguments."""

import argparse
from pathlib import Path

from sbs_jax.data import dataset_folder


def fill_in(arguments: argparse.Namespace) -> None:
    """Sets the arguments that are not given, if `--dataset` is a folder: places of inputs, prompt, store and records.

    Without a folder, records_dir and store must be given. ValueError names the missing flag.
    """
    names = arguments.dataset if isinstance(arguments.dataset, list) else [arguments.dataset]
    folders = [name for name in names if dataset_folder.is_folder(name)]
    if folders:
        folder = Path(folders[0])
        implied = {
            "inputs_dir": folder / dataset_folder.INPUTS,
            "prompt": folder / dataset_folder.PROMPT,
            "store": folder / "teacher.sqlite",
            "records_dir": folder / dataset_folder.RECORDS,
        }
        for flag, value in implied.items():
            if hasattr(arguments, flag) and getattr(arguments, flag) is None:
                setattr(arguments, flag, str(value))
        if getattr(arguments, "inputs", "") is None:
            arguments.inputs = "records"
    for flag in ("store", "records_dir"):
        if hasattr(arguments, flag) and getattr(arguments, flag) is None:
            raise ValueError(f"--{flag} is missing; only a folder with {dataset_folder.FILE} as --dataset implies it.")
