"""What the engine writes is what each model writes alone, whoever shares its batch."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_worlds import LIMITS, QUESTION, TINY, Reply, host_of, prompt_of, running, say
from tiny_models import DECODERS

from fedllm.config import ModelConfig
from fedllm.models import load_model
from fedllm.models.quiet import quiet
from fedllm.serving.generation import Generation
from fedllm.serving.host import Host
from fedllm.serving.refusals import Refusal
from fedllm.serving.scheduler import Limits
from fedllm.serving.sources import Source

QUESTIONS = ("What is 3 plus 4?", QUESTION, "hello", "Reverse the word apple", "Name a colour")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with running(host_of(tmp_path_factory.mktemp("adapters"))) as found:
        yield found


def alone(model: Any, prompt: list[int], new: int) -> list[int]:
    """Return what transformers generates for one prompt, the end of the turn included."""
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        use_cache=True,
    )
    return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


@pytest.mark.slow
def test_tokens_of_a_mixed_batch_equal_those_of_peft_one_at_a_time(host: Host) -> None:
    from peft import PeftModel

    with quiet():
        base = load_model(TINY, kind="causal-lm").model
    folders = dict(host.source.adapters)
    plain = PeftModel.from_pretrained(base, folders["client-0"], adapter_name="client-0")
    for name in list(folders)[1:]:
        plain.load_adapter(folders[name], adapter_name=name)
    asked = []
    drawn = random.Random(3)
    for i in range(24):  # they come while others run, and end at different times
        name = host.names[i % len(host.names)]
        prompt = prompt_of(host, QUESTIONS[i % 5] + " please" * drawn.randrange(9))
        asked.append((name, prompt, Reply(host, name, prompt, max_tokens=4 + i)))
        time.sleep(drawn.random() * 0.01)
    distinct = set()
    for name, prompt, reply in asked:
        text = reply.text()
        new = reply.one.max_new_tokens
        if name == "base":
            with plain.disable_adapter():
                wanted = alone(plain, prompt, new)
        else:
            plain.set_adapter(name)
            wanted = alone(plain, prompt, new)
        assert reply.one.tokens == wanted
        assert text == host.tokenizer.decode(wanted, skip_special_tokens=True)
        distinct.add((name, text))
    assert len({text for _, text in distinct}) > 10  # the adapters do say different things


@pytest.mark.slow
@pytest.mark.parametrize("family", DECODERS)
def test_families_with_windows_caps_and_other_positions_are_batched_rightly(
    family: str, tiny_model: Any
) -> None:
    model = ModelConfig(path=str(tiny_model(family)), dtype="float32", device="cpu")
    with quiet():
        plain = load_model(model, kind="causal-lm").model
    drawn = random.Random(5)
    with running(Host(Source(model), LIMITS)) as host:
        prompts = [[drawn.randrange(4, 300) for _ in range(n)] for n in (3, 21, 9, 14)]
        replies = []
        for prompt in prompts:
            replies.append(Reply(host, "base", prompt, max_tokens=16))
            time.sleep(0.01)
        for prompt, reply in zip(prompts, replies, strict=True):
            reply.pieces()
            assert reply.one.tokens == alone(plain, prompt, 16), family


def test_the_same_seed_gives_the_same_answer_in_any_company(host: Host) -> None:
    prompt = prompt_of(host, QUESTION)
    wish = {"temperature": 1.3, "seed": 11, "max_tokens": 24}
    first = Reply(host, "client-1", prompt, **wish).text()
    crowd = [Reply(host, n, prompt[:5], temperature=1.0, max_tokens=30) for n in host.names]
    again = Reply(host, "client-1", prompt, **wish).text()
    other = Reply(host, "client-1", prompt, **{**wish, "seed": 12}).text()
    assert first == again != other
    for reply in crowd:
        reply.text()


def test_stop_strings_end_an_answer_and_are_never_written(host: Host) -> None:
    prompt = prompt_of(host, QUESTION)
    whole = Reply(host, "base", prompt, max_tokens=30).text()
    assert len(whole) > 8
    stop = whole[4:7]  # across tokens
    pieces = Reply(host, "base", prompt, max_tokens=30, stop=(stop, "zzz")).pieces()
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish == "stop"


def test_penalties_and_biases_change_what_is_written(host: Host) -> None:
    prompt = prompt_of(host, QUESTION)
    plain = Reply(host, "base", prompt, max_tokens=20)
    plain.text()
    banned = plain.one.tokens[0]
    biased = Reply(host, "base", prompt, max_tokens=20, logit_bias={banned: -100.0})
    biased.text()
    assert banned not in biased.one.tokens
    often = Reply(host, "base", prompt, max_tokens=40, logit_bias={banned: 100.0})
    often.text()
    assert often.one.tokens == [banned] * 40
    penalised = Reply(
        host, "base", prompt, max_tokens=40, logit_bias={banned: 8.0}, frequency_penalty=2.0
    )
    penalised.text()
    assert 0 < penalised.one.tokens.count(banned) < 40


def test_logprobs_are_those_of_the_model(host: Host) -> None:
    with quiet():
        model = load_model(TINY, kind="causal-lm").model
    prompt = prompt_of(host, QUESTION)
    pieces = Reply(host, "base", prompt, max_tokens=5, top_logprobs=3).pieces()
    choices = [choice for piece in pieces for choice in piece.choices]
    ids = [*prompt, *(choice.token for choice in choices)]
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert len(choices) == 5
    for i, choice in enumerate(choices):
        row = wanted[len(prompt) - 1 + i]
        assert choice.logprob == pytest.approx(float(row[choice.token]), abs=1e-4)
        assert [t for t, _ in choice.top] == row.topk(3).indices.tolist()


# limits and faults


def test_a_full_queue_refuses_and_says_when_to_come_back(tmp_path: Path) -> None:
    host = host_of(tmp_path, Limits(max_batch=1, max_queue=2, kv_bytes=2**28))
    # the engine is not running, so whatever comes stays in the queue
    for _ in range(2):
        Reply(host, "base", [5, 6], max_tokens=4)
    with pytest.raises(Refusal) as caught:
        Reply(host, "base", [5, 6], max_tokens=4)
    assert caught.value.status == 429
    assert int(caught.value.headers["Retry-After"]) >= 1


def test_what_can_never_fit_is_refused_with_numbers(host: Host, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"512 tokens.*500.*100") as caught:
        Reply(host, "base", [5] * 500, max_tokens=100)
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
    tight = host_of(tmp_path, Limits(kv_bytes=host.token_bytes * 50))
    with pytest.raises(Refusal, match=rf"{61 * host.token_bytes} bytes") as caught:
        Reply(tight, "base", [5] * 51, max_tokens=10)
    assert caught.value.status == 413


def test_memory_for_keys_and_values_decides_how_many_run_together(tmp_path: Path) -> None:
    room = 40
    host = host_of(tmp_path, Limits(max_batch=8, kv_bytes=3072 * room * 2 + 100))
    assert host.token_bytes == 3072
    seen = []
    step = host.scheduler._batch.step

    def counted() -> torch.Tensor:
        seen.append(len(host.scheduler._batch.rows))
        return step()

    host.scheduler._batch.step = counted  # type: ignore[method-assign]
    with running(host):
        replies = [Reply(host, "base", [5] * 20, max_tokens=20) for _ in range(5)]
        for reply in replies:
            reply.one.ignores_end = True
        for reply in replies:
            reply.text()
    assert max(seen) == 2


def test_a_request_that_breaks_stops_nobody_else(tmp_path: Path) -> None:
    host = host_of(tmp_path)
    batch = host.scheduler._batch
    prefill = batch.prefill
    poison = 77

    def poisoned(rows: list[Generation]) -> Any:
        if any(poison in row.prompt for row in rows):
            raise ValueError("poison")
        return prefill(rows)

    batch.prefill = poisoned  # type: ignore[method-assign, assignment]
    good = [[5, 6], [7, 8, 9]]
    replies = [Reply(host, "base", p, max_tokens=6) for p in (good[0], [poison], good[1])]
    with running(host):
        answers = [reply.pieces() for reply in replies]
        assert [a[-1].error is None for a in answers] == [True, False, True]
        assert answers[1][-1].error is not None
        assert answers[1][-1].error.status == 500
        assert Reply(host, "base", good[0], max_tokens=6).text() == "".join(
            piece.text for piece in answers[0]
        )


def test_a_step_that_fails_ends_its_batch_and_not_the_engine(tmp_path: Path) -> None:
    host = host_of(tmp_path)
    batch = host.scheduler._batch
    step, is_broken = batch.step, [True]

    def sometimes() -> torch.Tensor:
        if is_broken.pop() if is_broken else False:
            raise ValueError("broken")
        return step()

    batch.step = sometimes  # type: ignore[method-assign]
    with running(host):
        error = Reply(host, "base", [5, 6], max_tokens=4).pieces()[-1].error
        assert error is not None
        assert error.status == 500
        assert Reply(host, "base", [5, 6], max_tokens=4).pieces()[-1].error is None


def test_out_of_memory_ends_the_largest_and_the_others_go_on(tmp_path: Path) -> None:
    host = host_of(tmp_path)
    batch = host.scheduler._batch
    step = batch.step

    def tight() -> torch.Tensor:
        if any(len(row.prompt) > 30 and len(row.tokens) > 3 for row in batch.rows):
            raise torch.OutOfMemoryError("no room")
        return step()

    batch.step = tight  # type: ignore[method-assign]
    small = Reply(host, "client-0", [5, 6, 7], max_tokens=12)
    large = Reply(host, "client-1", [5] * 40, max_tokens=12)
    small.one.ignores_end = large.one.ignores_end = True
    with running(host):
        error = large.pieces()[-1].error
        assert error is not None
        assert (error.status, error.code) == (503, "out_of_memory")
        text = small.text()
        alone = Reply(host, "client-0", [5, 6, 7], max_tokens=12)
        alone.one.ignores_end = True
        assert alone.text() == text


def test_output_that_is_not_finite_is_an_error_of_that_request_alone(tmp_path: Path) -> None:
    host = host_of(tmp_path)
    batch = host.scheduler._batch
    prefill = batch.prefill

    def spoiled(rows: list[Generation]) -> Any:
        logits, cache = prefill(rows)
        logits = logits.clone()
        for i, row in enumerate(rows):
            if row.prompt[0] == 9:
                logits[i] = float("nan")
        return logits, cache

    batch.prefill = spoiled  # type: ignore[method-assign, assignment]
    bad, good = (Reply(host, "base", [first, 6], max_tokens=4) for first in (9, 5))
    with running(host):
        error = bad.pieces()[-1].error
        assert error is not None
        assert error.code == "not_finite"
        assert good.pieces()[-1].error is None


def test_a_cancelled_answer_frees_its_place(tmp_path: Path) -> None:
    over: list[Generation] = []
    told = threading.Event()

    def note(one: Generation) -> None:
        over.append(one)
        told.set()

    found = host_of(tmp_path)
    host = Host(found.source, LIMITS, note)
    say(host, "again " * 400)
    with running(host):
        reply = Reply(host, "base", [5, 6], max_tokens=400)
        reply.box.get(timeout=10)
        reply.one.cancel()
        assert told.wait(10)
        assert over == [reply.one]
        assert reply.one.is_cancelled
        assert len(reply.one.tokens) < 400
        until = time.monotonic() + 10
        while host.scheduler.running and time.monotonic() < until:
            time.sleep(0.01)
        assert host.scheduler.running == 0
        assert host.scheduler.kv_bytes == 0


def test_closing_the_engine_tells_everybody(tmp_path: Path) -> None:
    host = host_of(tmp_path, Limits(max_batch=1, kv_bytes=2**28))
    say(host, "again " * 400)
    with running(host):
        replies = [Reply(host, "base", [5, 6], max_tokens=400) for _ in range(3)]
        replies[0].box.get(timeout=10)
    for reply in replies:
        error = reply.pieces()[-1].error
        assert error is not None
        assert error.status == 503
    with pytest.raises(Refusal, match="stopping"):
        Reply(host, "base", [5, 6], max_tokens=4)
