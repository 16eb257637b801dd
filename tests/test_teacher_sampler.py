"""The sampler's decisions, against a scripted teacher in this process."""

import asyncio
import random
import time
from collections import Counter
from typing import Any

import pytest
from builders.teacher_requests import Row

from sbs_jax.teacher import money, pacing, sampler
from sbs_jax.teacher.clients import REFUSED, Again, Failed, Fatal, Parameters, Refused, Reply, Request
from sbs_jax.teacher.store import Failure, Store


class Teacher:
    """Answers by a function of the request and of how often it was asked before; counts what it answered."""

    def __init__(self, answer, *, latency: float = 0.0) -> None:
        self.answer, self.latency = answer, latency
        self.asked: Counter[str] = Counter()  # by prompt
        self.requests: list[Request] = []
        self.paid = 0
        self.flying = self.most_flying = 0

    async def ask(self, request: Request) -> Reply:
        shown = request.prompt.text
        before = self.asked[shown]
        self.asked[shown] += 1
        self.requests.append(request)
        self.flying += 1
        self.most_flying = max(self.most_flying, self.flying)
        try:
            await asyncio.sleep(self.latency)
            given = self.answer(request, before)
        finally:
            self.flying -= 1
        if isinstance(given, Exception):
            raise given
        self.paid += 1
        return given if isinstance(given, Reply) else reply(given)

    async def close(self) -> None:
        pass


def reply(text: str, *, finish: str = "stop", output_tokens: int = 5) -> Reply:
    return Reply(text=text, finish=finish, input_tokens=10, output_tokens=output_tokens, model="m")


def settings(**changes) -> sampler.Settings:
    plain = {"model": "m", "form": "chat", "parameters": Parameters(temperature=0.0, max_tokens=100), "concurrency": 4}
    return sampler.Settings(**{**plain, **changes})


def rows(count: int) -> list[Row]:
    return [Row(f"r{number}") for number in range(count)]


def run(path, teacher, asked, *, price=None, **changes) -> sampler.Totals:
    with Store(path / "store.sqlite") as store:
        made = sampler.Sampler(settings=settings(**changes), client=teacher, store=store, price=price)
        return asyncio.run(made.run(asked))


def stored(path, asked, *, sample=0, room=0, hint=None, **changes):
    keys = [sampler.request_of(row, settings(**changes), sample=sample, room=room, hint=hint).key for row in asked]
    with Store(path / "store.sqlite") as store:
        found = store.find(keys)
    return [found.get(key) for key in keys]


def always(text: str):
    return lambda request, before: text


def test_every_row_is_asked_once_and_never_again(tmp_path):
    teacher = Teacher(always("so:yes"))
    totals = run(tmp_path, teacher, rows(30))
    assert (totals.rows, totals.asked, totals.replies, totals.found) == (30, 30, 30, 0)
    assert set(teacher.asked.values()) == {1}
    assert stored(tmp_path, rows(30)) == [reply("so:yes")] * 30
    again = Teacher(always("other:no"))
    totals = run(tmp_path, again, rows(30))
    assert (totals.rows, totals.asked, totals.found) == (30, 0, 30)


def test_rows_may_be_added_and_turned_around_and_speed_changed(tmp_path):
    run(tmp_path, Teacher(always("so:yes")), rows(10))
    teacher = Teacher(always("so:yes"))
    run(tmp_path, teacher, rows(13)[::-1], concurrency=2, retries=1, requests_per_minute=1e6, unusable=0.9)
    assert sorted(teacher.asked) == ["r10?", "r11?", "r12?"]


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "other"},
        {"form": "completion"},
        {"parameters": Parameters(temperature=0.5, max_tokens=100)},
        {"parameters": Parameters(temperature=0.0, max_tokens=100, stops=("Q:",))},
    ],
)
def test_what_shapes_a_reply_is_part_of_its_key(tmp_path, changes):
    run(tmp_path, Teacher(always("so:yes")), rows(3))
    teacher = Teacher(always("so:yes"))
    run(tmp_path, teacher, rows(3), **changes)
    assert sum(teacher.asked.values()) == 3


def test_samples_are_separate_requests(tmp_path):
    warm: dict[str, Any] = {"parameters": Parameters(temperature=0.7, max_tokens=100)}
    teacher = Teacher(lambda request, before: f"s{request.sample}:yes")
    run(tmp_path, teacher, rows(5), samples=3, **warm)
    assert set(teacher.asked.values()) == {3}
    for sample in range(3):
        assert stored(tmp_path, rows(5), sample=sample, **warm) == [reply(f"s{sample}:yes")] * 5
    # Two more samples pay for two.
    more = Teacher(always("so:yes"))
    run(tmp_path, more, rows(5), samples=5, **warm)
    assert set(more.asked.values()) == {2}


@pytest.mark.parametrize(
    ("labels", "chosen"),
    [
        (["a", "b", "b"], 1),
        (["a", "b"], 0),
        ([None, "a"], 1),
        ([None, None], None),
        (["2", "1 + 1", "3"], 0),
    ],
)
def test_majority(labels, chosen):
    def same(a, b):
        return a == b or {a, b} == {"2", "1 + 1"}

    assert sampler.majority(labels, same) == chosen


def test_a_label_that_differs_is_asked_again_with_the_hint(tmp_path):
    asked = [Row("right", "yes"), Row("wrong", "no"), Row("unlabelled", None)]
    teacher = Teacher(lambda request, before: "so:no" if "It is" in request.prompt.text else "so:yes")
    run(tmp_path, teacher, asked, hint=True)
    assert sorted(teacher.asked) == ["right?", "unlabelled?", "wrong?", "wrong? It is no."]
    again = Teacher(always("so:yes"))
    run(tmp_path, again, asked, hint=True)
    assert not again.asked


def test_a_reply_cut_short_is_asked_again_with_more_room(tmp_path):
    def answer(request, before):
        if request.prompt.text == "r0?" or request.parameters.max_tokens < 200:
            return reply("so", finish="length")
        return "so:yes"

    teacher = Teacher(answer)
    totals = run(tmp_path, teacher, rows(3))
    assert [r.parameters.max_tokens for r in teacher.requests if r.prompt.text == "r0?"] == [100, 200, 400]
    assert [r.parameters.max_tokens for r in teacher.requests if r.prompt.text == "r1?"] == [100, 200]
    assert totals.failures == {"length": 1}
    again = Teacher(answer)
    assert run(tmp_path, again, rows(3)).failures == {"length": 1}
    assert not again.asked


def test_errors_that_pass_are_repeated_and_then_given_up_until_the_next_run(tmp_path, monkeypatch):
    monkeypatch.setattr(pacing, "FIRST_DELAY", 0.001)
    teacher = Teacher(lambda request, before: Again("502") if request.prompt.text == "r0?" or before < 2 else "so:yes")
    totals = run(tmp_path, teacher, rows(3), retries=4)
    assert teacher.asked == {"r0?": 5, "r1?": 3, "r2?": 3}
    assert totals.failures == {"gave_up": 1}
    assert totals.stopped is None
    teacher = Teacher(always("so:yes"))
    run(tmp_path, teacher, rows(3))
    assert teacher.asked == {"r0?": 1}


def test_retry_after_is_kept(tmp_path):
    times = []

    def answer(request, before):
        times.append(time.monotonic())
        return Again("busy", retry_after=0.4) if before == 0 else "so:yes"

    run(tmp_path, Teacher(answer), rows(1))
    assert times[1] - times[0] >= 0.4


def test_429_makes_everyone_wait_and_halves_what_is_in_flight_which_recovers(tmp_path):
    """A teacher with 8 places and 32 workers: no row fails, and most requests find a place."""
    flying = 0

    class Crowded(Teacher):
        async def ask(self, request):
            nonlocal flying
            flying += 1
            try:
                self.crowded = flying > 8
                if self.crowded:
                    await asyncio.sleep(0.002)
                    raise Again("429", limited=True, retry_after=0.02)
                return await super().ask(request)
            finally:
                flying -= 1

    teacher = Crowded(always("so:yes"), latency=0.01)
    totals = run(tmp_path, teacher, rows(600), concurrency=32, retries=0)
    assert totals.replies == 600
    assert not totals.failures
    assert teacher.paid == 600
    assert totals.retried < 600


def refused(status: int = 400, reason: str = REFUSED) -> Refused:
    error = Refused(f"The teacher refuses the request ({status}: in its words).", reason=reason)
    error.status = status
    return error


@pytest.mark.parametrize("status", [400, 403, 413, 422])
@pytest.mark.parametrize("bad", [{"r0?"}, {"r0?", "r1?", "r2?"}, {"r5?"}, {"r18?", "r19?"}])
def test_a_refusal_is_the_row_s_fault_once_another_row_is_answered(tmp_path, status, bad):
    teacher = Teacher(lambda request, before: refused(status) if request.prompt.text in bad else "so:yes")
    totals = run(tmp_path, teacher, rows(20))
    assert (totals.replies, totals.failures) == (20 - len(bad), {"refused": len(bad)})
    assert set(teacher.asked.values()) == {1}
    again = Teacher(always("so:yes"))
    run(tmp_path, again, rows(20))
    assert not again.asked


def test_a_long_row_of_refusals_after_a_reply_is_recorded(tmp_path):
    """Also in the next run, which finds the reply in the store, and is asked about other rows."""
    teacher = Teacher(lambda request, before: "so:yes" if request.prompt.text == "r0?" else refused())
    assert run(tmp_path, teacher, rows(60)).failures == {"refused": 59}
    assert run(tmp_path, Teacher(lambda request, before: refused(422)), rows(63)).failures == {"refused": 3}


@pytest.mark.parametrize("reason", ["refused", "too_long", "content_filter"])
def test_a_refusal_of_all_the_first_rows_ends_the_run(tmp_path, reason):
    teacher = Teacher(lambda request, before: refused(422, reason))
    with pytest.raises(Fatal, match=r"422: in its words.*10 rows were refused in a row"):
        run(tmp_path, teacher, rows(1000), samples=2, parameters=Parameters(temperature=1.0, max_tokens=100))
    assert sum(teacher.asked.values()) < 2 * (10 + 4)
    with Store(tmp_path / "store.sqlite") as store:
        assert store.counts()["failures"] == 0


def test_fewer_rows_that_are_all_refused_are_at_fault_only_if_the_provider_says_so(tmp_path):
    with pytest.raises(Fatal, match=r"400: in its words.*No row was answered"):
        run(tmp_path, Teacher(lambda request, before: refused()), rows(3))
    totals = run(tmp_path, Teacher(lambda request, before: refused(413, "too_long")), rows(3))
    assert totals.failures == {"too_long": 3}


def test_permissions_that_are_lost_in_the_middle_end_the_run(tmp_path):
    teacher = Teacher(lambda request, before: "so:yes" if len(teacher.asked) <= 30 else refused(403))
    with pytest.raises(Fatal, match="403: in its words"):
        run(tmp_path, teacher, rows(1000))
    assert sum(teacher.asked.values()) < 50
    with Store(tmp_path / "store.sqlite") as store:
        assert store.counts()["failures"] == 0


@pytest.mark.parametrize("reason", ["refused", "too_long"])
def test_more_room_that_is_refused_leaves_a_truncated_reply(tmp_path, reason):
    def answer(request, before):
        return refused(400, reason) if request.parameters.max_tokens > 200 else reply("so", finish="length")

    assert run(tmp_path, Teacher(answer), rows(12)).failures == {"length": 12}
    again = Teacher(answer)
    assert run(tmp_path, again, rows(12)).failures == {"length": 12}
    assert not again.asked


def test_what_is_given_up_is_counted_with_the_provider_s_words(tmp_path):
    words = {"r0?": Again("The connection failed."), "r1?": Again("No text."), "r2?": Again("No text.")}
    totals = run(
        tmp_path, Teacher(lambda request, before: words.get(request.prompt.text, "so:yes")), rows(9), retries=0
    )
    assert totals.given_up == {"The connection failed.": 1, "No text.": 2}
    assert (totals.failures, totals.stopped, totals.replies) == ({"gave_up": 3}, None, 6)


def test_a_teacher_that_never_answers_is_not_asked_about_every_row(tmp_path):
    teacher = Teacher(lambda request, before: Again("The connection failed."))
    totals = run(tmp_path, teacher, rows(1000), retries=0)
    assert sum(teacher.asked.values()) <= 10 + 4
    assert totals.stopped is not None
    assert "10 requests one after the other were given up" in totals.stopped


@pytest.mark.parametrize(
    ("error", "changes"),
    [
        (Again("429", limited=True, retry_after=1e9), {}),
        (Again("502", retry_after=1e9), {}),
        (None, {"requests_per_minute": 0.5}),
        (None, {"tokens_per_minute": 0.5}),
    ],
)
def test_stop_ends_all_waiting_at_once_and_the_run_says_what_it_waits_for(
    tmp_path, caplog, monkeypatch, error, changes
):
    monkeypatch.setattr(sampler, "QUIET", 0.05)
    teacher = Teacher(lambda request, before: error or "so:yes")

    async def stopped(made):
        ask = asyncio.create_task(made.run(rows(100)))
        await asyncio.sleep(0.2)
        made.stop()
        return await ask

    begin = time.monotonic()
    with Store(tmp_path / "store.sqlite") as store:
        made = sampler.Sampler(settings=settings(**changes), client=teacher, store=store, price=None)
        totals = asyncio.run(stopped(made))
    assert time.monotonic() - begin < 2
    assert totals.stopped == "interrupted"
    assert totals.asked == sum(teacher.asked.values())
    said = caplog.text
    assert "No reply for 0 s: 0 requests at the teacher" in said
    assert ("4 held by the rate limits" if error is None else f"{error} Asking again in 600 s") in said


def test_nothing_is_asked_again_after_a_stop(tmp_path):
    """The requests in flight are turned away after it."""
    teacher = Teacher(lambda request, before: Again("429", limited=True, retry_after=1e9), latency=0.2)

    async def stopped(made):
        ask = asyncio.create_task(made.run(rows(100)))
        await asyncio.sleep(0.05)
        made.stop()
        async with asyncio.timeout(2):
            return await ask

    with Store(tmp_path / "store.sqlite") as store:
        made = sampler.Sampler(settings=settings(), client=teacher, store=store, price=None)
        assert asyncio.run(stopped(made)).asked == 4


def test_refusals_are_judged_when_the_slower_replies_have_come(tmp_path):
    class Slow(Teacher):
        async def ask(self, request):
            self.latency = 0.2 if request.prompt.text == "r0?" else 0.0
            return await super().ask(request)

    teacher = Slow(lambda request, before: "so:yes" if request.prompt.text in ("r0?", "r49?") else refused())
    totals = run(tmp_path, teacher, rows(50), concurrency=16)
    assert (totals.replies, totals.failures) == (2, {"refused": 48})


def test_a_wait_that_the_provider_asks_for_has_an_end():
    assert pacing.backoff(0, Again("429", retry_after=1e9)) == 600.0
    assert pacing.backoff(0, Again("429", retry_after=599.0)) == 599.0


def test_a_teacher_that_always_turns_away_does_not_hold_the_run_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(sampler, "_MOST_TURNS", 5)
    teacher = Teacher(lambda request, before: Again("429", limited=True, retry_after=0.001))
    totals = run(tmp_path, teacher, rows(3), retries=0)
    assert set(teacher.asked.values()) == {6}
    assert totals.failures == {"gave_up": 3}


def test_the_places_shrink_once_per_burst_and_grow_back():
    places = pacing.ConcurrencyLimit(16)
    begin = time.monotonic()
    for _ in range(16):
        places.shrink(0.0, since=begin)
    assert places.limit == 8
    places.shrink(0.0, since=time.monotonic())
    assert places.limit == 4
    for _ in range(1000):
        places.grow()
    assert places.limit == 16


def test_what_is_hopeless_is_recorded_with_its_reason(tmp_path):
    teacher = Teacher(
        lambda request, before: (
            Failed("kept back", reason="content_filter") if request.prompt.text == "r1?" else "so:yes"
        )
    )
    totals = run(tmp_path, teacher, rows(3))
    assert totals.failures == {"content_filter": 1}
    assert stored(tmp_path, rows(3))[1] == Failure("content_filter", "kept back")
    again = Teacher(always("so:yes"))
    totals = run(tmp_path, again, rows(3))
    assert not again.asked
    assert totals.rows == 3


def test_a_refusal_ends_the_run_at_once_and_keeps_what_came(tmp_path):
    teacher = Teacher(
        lambda request, before: Fatal("no such model") if request.prompt.text == "r5?" else "so:yes", latency=0.01
    )
    with pytest.raises(Fatal, match="no such model"):
        run(tmp_path, teacher, rows(1000))
    assert sum(teacher.asked.values()) < 20
    assert sum(x is not None for x in stored(tmp_path, rows(1000))) == teacher.paid


@pytest.mark.parametrize("pace", [{}, {"requests_per_minute": 12_000}])
def test_max_requests_is_kept_exactly(tmp_path, pace):
    teacher = Teacher(always("so:yes"), latency=0.005)
    totals = run(tmp_path, teacher, rows(100), max_requests=17, **pace)
    assert teacher.paid == totals.asked == 17
    assert totals.stopped == "max_requests 17 reached"
    assert sum(x is not None for x in stored(tmp_path, rows(100))) == 17


@pytest.mark.parametrize("output_tokens", [5, 100])
def test_max_cost_is_never_exceeded(tmp_path, output_tokens):
    price = money.Price(input=10.0, output=100.0, batch=0.5)
    teacher = Teacher(lambda request, before: reply("so:yes", output_tokens=output_tokens), latency=0.005)
    each = money.cost(price, input_tokens=10, output_tokens=output_tokens, batch=False)
    limit = 30.5 * money.cost(price, input_tokens=10, output_tokens=100, batch=False)
    totals = run(tmp_path, teacher, rows(10_000), price=price, max_cost=limit, concurrency=16)
    assert totals.stopped is not None
    assert "max_cost" in totals.stopped
    assert totals.spent == pytest.approx(teacher.paid * each)
    assert limit - 2 * money.cost(price, input_tokens=10, output_tokens=100, batch=False) < totals.spent <= limit


def test_a_limit_of_cost_needs_a_price(tmp_path):
    with pytest.raises(ValueError, match="--price IN,OUT"):
        run(tmp_path, Teacher(always("so:yes")), rows(1), max_cost=1.0)


@pytest.mark.parametrize("limit", [{"requests_per_minute": 3600}, {"tokens_per_minute": 3600 * 15}])
def test_the_provider_s_limits_per_minute_are_kept(tmp_path, limit):
    """90 requests at 60 a second, of 15 tokens each, take 1.5 seconds."""
    parameters = Parameters(temperature=0.0, max_tokens=10)
    begin = time.monotonic()
    totals = run(tmp_path, Teacher(always("so:yes")), rows(90), concurrency=6, parameters=parameters, **limit)
    assert totals.replies == 90
    assert 1.3 < time.monotonic() - begin < 4.0


def test_too_many_unusable_replies_end_the_run_and_are_shown(tmp_path):
    teacher = Teacher(
        lambda request, before: "I cannot say" if random.Random(request.prompt.text).random() < 0.5 else "s:y"
    )
    with pytest.raises(sampler.UnusableRepliesError, match=r"limit 30%[\s\S]*'I cannot say'[\s\S]*--dry_run") as error:
        run(tmp_path, teacher, rows(1000))
    assert str(error.value).count("I cannot say") == 10
    assert teacher.paid < 70
    totals = run(tmp_path, Teacher(teacher.answer), rows(1000), unusable=0.9)
    assert totals.rows == 1000


def test_an_interruption_keeps_what_is_in_flight(tmp_path):
    teacher = Teacher(always("so:yes"), latency=0.05)

    async def interrupted(made):
        ask = asyncio.create_task(made.run(rows(1000)))
        await asyncio.sleep(0.12)
        made.stop()
        return await ask

    with Store(tmp_path / "store.sqlite") as store:
        made = sampler.Sampler(settings=settings(concurrency=8), client=teacher, store=store, price=None)
        totals = asyncio.run(interrupted(made))
    assert totals.stopped == "interrupted"
    assert 8 <= teacher.paid < 100
    assert sum(x is not None for x in stored(tmp_path, rows(1000))) == teacher.paid


def test_a_disk_that_fails_ends_the_run(tmp_path):
    with Store(tmp_path / "store.sqlite") as store:

        def fails(values):
            raise OSError("No space left on device")

        store._commit = fails
        made = sampler.Sampler(settings=settings(), client=Teacher(always("so:yes")), store=store, price=None)
        with pytest.raises(OSError, match="No space left"):
            asyncio.run(made.run(rows(100)))
    assert made.totals.asked <= 8


@pytest.mark.parametrize("seed", range(5))
def test_whatever_happens_every_row_has_a_reply_or_a_reason(tmp_path, seed, monkeypatch):
    monkeypatch.setattr(pacing, "FIRST_DELAY", 0.001)
    chance = random.Random(seed)

    def answer(request, before):
        roll = chance.random()
        if roll < 0.15:
            return Again("busy", limited=True, retry_after=0.002)
        if roll < 0.3:
            return Again("reset")
        if roll < 0.35:
            return Failed("no", reason="content_filter")
        if roll < 0.4:
            return reply("so", finish="length")
        return "so:yes"

    teacher = Teacher(answer, latency=0.001)
    totals = run(tmp_path, teacher, rows(200), concurrency=16, retries=20)
    first = stored(tmp_path, rows(200))
    assert totals.rows == 200
    assert all(x is not None for x in first)
    # Nothing that was answered was asked again: what is paid for is what is stored.
    with Store(tmp_path / "store.sqlite") as store:
        assert store.counts()["replies"] == teacher.paid


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 3}, "at temperature 0"),
        ({"form": "letter"}, "expected one of chat, completion"),
        ({"concurrency": 0}, "at least 1"),
        ({"max_cost": -1.0}, "number above 0"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)
