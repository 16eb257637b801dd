"""Rows of a user's own: questions about plants, whose words tell the topic."""

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
