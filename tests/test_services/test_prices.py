"""What tokens cost, and that nobody is asked over the network."""

import socket
import time

import pytest

from app.services.prices import cost


@pytest.mark.parametrize(
    ("model", "prompt", "completion", "dollars"),
    [
        ("gpt-4o", 1000, 100, 0.0035),
        ("gpt-4o-2024-08-06", 1000, 100, 0.0035),
        ("gpt-4o", 0, 0, 0.0),
        ("gpt-4o", 3, 0, 0.0000075),
        ("gpt-5-mini", 1_000_000, 1_000_000, 2.25),
    ],
)
def test_tokens_cost_their_list_price(
    model: str, prompt: int, completion: int, dollars: float
) -> None:
    assert cost(model, prompt, completion) == dollars


def test_a_long_prompt_pays_its_tiers_price_from_the_first_token() -> None:
    assert cost("gemini-2.5-pro", 200_000, 0) == 0.25
    assert cost("gemini-2.5-pro", 200_001, 0) == 0.5000025


@pytest.mark.parametrize("model", ["scripted", "demo", "", "gpt", "\ud800", "x" * 5000])
def test_an_unknown_model_has_no_price(model: str) -> None:
    assert cost(model, 10, 10) is None


def test_nothing_is_fetched_and_little_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("The network was asked.")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert cost("gpt-4.1", 1, 1) is not None

    begun = time.process_time()
    for _ in range(1000):
        cost("gpt-4.1", 1000, 100)

    assert time.process_time() - begun < 0.1
