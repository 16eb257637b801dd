"""Prices, costs, the rough count of tokens, and the account of a run against a teacher that bills as real ones do."""

import asyncio
import datetime
import json

import pytest
import sentencepiece
from builders.teacher_requests import Row
from teacher_server import Server, served

from sbs_jax.teacher import money, prompts, providers, sampler
from sbs_jax.teacher.clients import Parameters
from sbs_jax.teacher.money import Price
from sbs_jax.teacher.store import Store

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


# ------------------------------------------------------------------------------------------------ the account

PRICE = Price(input=2.5, output=10.0, batch=0.5)


def billed(server: Server) -> float:
    return money.cost(PRICE, input_tokens=server.billed[0], output_tokens=server.billed[1], batch=False)


def account(
    server: Server, path, monkeypatch, *, provider: str = "openai", count: int = 60, **changes
) -> sampler.Totals:
    """Runs the sampler with the real SDK, and returns what it has counted."""
    pytest.importorskip("openai" if provider == "openai" else "google.genai", reason="the extra `teacher` is missing")
    for name in ("OPENAI_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.setenv(name, "a-key")
    base_url = server.openai if provider == "openai" else server.gemini
    plain = {"parameters": Parameters(temperature=0.0, max_tokens=50), "concurrency": 16, "unusable": 1.0}
    settings = sampler.Settings(model="m", form="chat", **{**plain, **changes})

    async def run() -> sampler.Totals:
        client = providers.make(provider, base_url=base_url, timeout=2.0, connections=settings.concurrency)
        with Store(path / "store.sqlite") as store:
            made = sampler.Sampler(settings=settings, client=client, store=store, price=PRICE)
            totals = await made.run(Row(f"Row {number} of many rows") for number in range(count))
        await client.close()
        return totals

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("provider", "bills"),
    [
        ("openai", {"thinking": 3000}),
        ("openai", {"thinking": 3000, "thinking_in_total": True}),
        ("gemini", {"thinking": 3000}),
        ("openai", {"prompt_factor": 1000}),
    ],
)
def test_max_cost_is_kept_if_replies_bill_more_than_max_tokens_and_prompts_more_than_estimated(
    provider, bills, tmp_path, monkeypatch
) -> None:
    with served(latency=0.05, **bills) as server:
        totals = account(server, tmp_path, monkeypatch, provider=provider, max_cost=0.5)
        assert totals.stopped is not None
        assert "max_cost $0.5 reached" in totals.stopped
        assert totals.spent == pytest.approx(billed(server))
        assert 0.5 - 2 * billed(server) / server.asked < billed(server) <= 0.5
        assert server.most_in_flight > 2


def test_one_reply_that_costs_more_than_the_limit_is_the_only_one(tmp_path, monkeypatch) -> None:
    with served(latency=0.01, thinking=30_000) as server:
        totals = account(server, tmp_path, monkeypatch, max_cost=0.1)
        assert (server.asked, totals.spent) == (1, pytest.approx(billed(server)))


@pytest.mark.parametrize("provider", ["openai", "gemini"])
def test_every_reply_is_booked_whatever_becomes_of_it(provider, tmp_path, monkeypatch) -> None:
    counted = ["filter", "prompt_filter", "empty", "null", "length"]
    with served(faults=counted * 4, thinking=100) as server:
        totals = account(server, tmp_path, monkeypatch, provider=provider, count=20, retries=0)
        assert totals.spent == pytest.approx(billed(server))
        assert (totals.input_tokens, totals.output_tokens) == server.billed
        assert totals.presumed == 0
    lost = ["malformed", "reset", "close", "hang", 504]
    with served(faults=[*lost, None, 500, 429, "too_long"]) as server:
        totals = account(server, tmp_path / "lost", monkeypatch, provider=provider, count=9, retries=0, concurrency=1)
        assert totals.spent >= billed(server) > 0
        assert totals.presumed > 0
        # An answer without a bill costs nothing: five were lost, one came.
        est = 5 * money.cost(PRICE, input_tokens=9, output_tokens=50, batch=False)
        assert totals.presumed == pytest.approx(est, rel=0.1)


def test_a_connection_that_is_refused_costs_nothing(tmp_path, monkeypatch) -> None:
    with served() as server:
        pass
    totals = account(server, tmp_path, monkeypatch, count=3, retries=0, max_cost=1.0)
    assert (totals.spent, totals.failures) == (0.0, {"gave_up": 3})
    assert "connection failed" in next(iter(totals.given_up))
