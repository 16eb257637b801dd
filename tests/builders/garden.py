"""Rows of a user's own: questions about plants, whose words tell the topic."""

from pathlib import Path

from sbs_jax.data import own_data, own_experiments, table

TOPICS = {
    "water": ("dry", "thirsty", "wilting"),
    "pests": ("bugs", "holes", "slugs"),
    "soil": ("sandy", "acid", "clay"),
}
ROWS = [
    {"text": f"My {plant}, number {number}: {word}, what now?", "team": topic}
    for number, plant in enumerate(["rose", "fig", "leek", "palm", "oak"])
    for topic, words in TOPICS.items()
    for word in words
]
EXPLAINED = [{**row, "rationale": f"It is about {row['team']}."} for row in ROWS]


def write_folder(folder: Path) -> None:
    """Writes the folder of a dataset, with the teacher's records, as `sbs init` does for such a table."""
    rows = table.table_of(EXPLAINED, [f"row {number}" for number in range(len(EXPLAINED))], where="rows")
    plan = own_data.plan(str(folder), tables={None: rows}, label_column="team")
    own_data.write(plan, folder, gin=own_experiments.of(plan, folder))
