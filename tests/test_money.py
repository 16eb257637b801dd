"""Prices, costs, and the rough count of tokens."""

import datetime
import json

import pytest
import sentencepiece

from sbs_jax.teacher import money, prompts
from sbs_jax.teacher.money import Price

LISTED = json.loads(money.PRICES.read_text("utf-8"))


def test_every_listed_price_is_one_and_is_dated() -> None:
    assert {"gpt-4o", "gpt-4o-mini", "gpt-4.1", "o4-mini", "gemini-2.0-flash", "gemini-2.5-pro"} <= LISTED[
        "models"
    ].keys()
    assert "check" in LISTED["note"]
    for name in LISTED["models"]:
        found = money.price(name, override=None)
        assert found is not None
        assert 0 < found.input < found.output < 100
        assert found.batch == 0.5
        assert datetime.date(2024, 1, 1) < datetime.date.fromisoformat(found.as_of or "") <= datetime.date.today()
    assert LISTED["dated"] == max(fields["as_of"] for fields in LISTED["models"].values())


@pytest.mark.parametrize(
    ("model", "listed"),
    [
        ("gpt-4o", "gpt-4o"),
        ("gpt-4o-2024-08-06", "gpt-4o"),
        ("gpt-4o-2024-05-13", "gpt-4o-2024-05-13"),
        ("gpt-4o-mini", "gpt-4o-mini"),
        ("gpt-4o-mini-2024-07-18", "gpt-4o-mini"),
        ("gpt-4.1-2025-04-14", "gpt-4.1"),
        ("gpt-4.1-mini-2025-04-14", "gpt-4.1-mini"),
        ("o4-mini-2025-04-16", "o4-mini"),
        ("gemini-2.0-flash-001", "gemini-2.0-flash"),
        ("gemini-2.0-flash-lite-001", "gemini-2.0-flash-lite"),
        ("models/gemini-2.5-flash", "gemini-2.5-flash"),
        ("publishers/google/models/gemini-2.5-pro", "gemini-2.5-pro"),
        ("projects/p/locations/global/publishers/google/models/gemini-2.5-flash-lite", "gemini-2.5-flash-lite"),
    ],
)
def test_version_of_a_model_has_the_model_s_price(model: str, listed: str) -> None:
    fields = LISTED["models"][listed]
    assert money.price(model, override=None) == Price(**fields)


@pytest.mark.parametrize(
    "model",
    [
        *("", "gpt", "gpt-4", "gpt-40", "gpt-4o-", "gpt-4ox", "gpt-4o-audio-preview", "gpt-4o-mini-tts", "gpt-4o-2024"),
        *(
            "gpt-4o-realtime-preview-2024-12-17",
            "gemini-2.5-flash-image",
            "gemini-2.5-flash-preview-04-17",
            "gpt-4.1-micro",
        ),
        *("ft:gpt-4o-mini-2024-07-18:me::1", "someone/gpt-4o", "meta-llama/Llama-3.1-8B-Instruct", "scripted"),
    ],
)
def test_price_of_another_model_is_not_known(model: str) -> None:
    assert money.price(model, override=None) is None


def test_override_wins_and_says_nothing_of_a_date() -> None:
    assert money.price("gpt-4o", override="2,8") == Price(input=2.0, output=8.0, batch=0.5, as_of=None)
    assert money.price("unheard-of", override=" 0 , 0.25, 1") == Price(input=0.0, output=0.25, batch=1.0)


@pytest.mark.parametrize("text", ["", "2", "2;8", "2,8,0.5,1", "-1,2", "nan,1", "1,inf", "two,8", "2,5,10", "$2,$8"])
def test_override_that_is_no_price_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"IN,OUT in USD per million tokens"):
        money.price("gpt-4o", override=text)


def test_malformed_price_file_names_the_model(tmp_path, monkeypatch) -> None:
    path = tmp_path / "prices.json"
    path.write_text(json.dumps({"models": {"m": {"input": 1, "outputs": 2}}}), "utf-8")
    monkeypatch.setattr(money, "PRICES", path)
    with pytest.raises(ValueError, match=r"prices\.json: .*'m\.outputs'"):
        money.price("m", override=None)


def test_cost_counts_both_directions_and_batch_mode() -> None:
    price = Price(input=3.0, output=8.0, batch=0.25)
    assert money.cost(price, input_tokens=2_000_000, output_tokens=500_000, batch=False) == 10.0
    assert money.cost(price, input_tokens=2_000_000, output_tokens=500_000, batch=True) == 2.5
    assert money.cost(price, input_tokens=0, output_tokens=0, batch=False) == 0.0


@pytest.mark.parametrize(("text", "tokens"), [("", 0), ("a", 1), ("abcd", 1), ("abcde", 2), ("\u65e5\u672c\u8a9e", 3)])
def test_tokens_are_a_quarter_of_the_bytes(text: str, tokens: int) -> None:
    assert money.estimate_tokens(text) == tokens
    assert money.estimate_tokens("\ud800") == 1


def test_estimate_is_as_rough_as_it_says(real_vocab, real_data_dir) -> None:
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(real_vocab))
    for name in ("esnli", "anli1", "cqa", "svamp"):
        replies = json.loads((real_data_dir / name / "llm" / "test_CoT_0.json").read_text("utf-8"))[:300]
        template = prompts.read(name)
        shown = [prompts.render(template, exemplar.input).text for exemplar in template.exemplars]
        for texts in (replies, shown):
            counted = sum(len(tokenizer.encode(text)) for text in texts)
            assert 0.86 <= sum(map(money.estimate_tokens, texts)) / counted <= 1.06, name
