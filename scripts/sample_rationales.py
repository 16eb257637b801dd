"""Asks a hosted model for rationales and labels: `sbs teach`, with the same flags.

    python scripts/sample_rationales.py --dataset svamp --inputs_dir dss --provider openai --model gpt-4o-mini \\
        --store svamp.sqlite --records_dir records
"""

import sys

from sbs_jax.cli import main

if __name__ == "__main__":
    sys.exit(main.main(["teach", *sys.argv[1:]]))
