"""What a model's tokens cost, by the prices that come with `genai-prices`; nothing is fetched."""

from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from genai_prices.types import ModelPrice, TieredPrices

MILLION = 1_000_000
SHORT = 1000  # tokens of a request that no provider charges more for


def cost(model: str, prompt_tokens: int, completion_tokens: int) -> float | None:
    """US dollars for one request, at list price; None for a model without a known one.

    model: the provider's name for it, such as `gpt-4o`.
    """
    price = _price(model)
    if price is None:
        return None
    dollars = prompt_tokens * _rate(price.input_mtok, prompt_tokens)
    dollars += completion_tokens * _rate(price.output_mtok, prompt_tokens)
    return round(float(dollars / MILLION), 10)


def total(model: str, prompt_tokens: float, completion_tokens: float) -> float | None:
    """The same for many requests, each at the price of a short one."""
    sent, received = cost(model, SHORT, 0), cost(model, 0, SHORT)
    if sent is None or received is None:
        return None
    return round((sent * prompt_tokens + received * completion_tokens) / SHORT, 10)


@lru_cache(maxsize=256)
def _price(model: str) -> "ModelPrice | None":
    from genai_prices import Usage, calc_price

    try:
        return calc_price(Usage(), model).model_price
    except LookupError:
        return None


def _rate(price: "Decimal | TieredPrices | None", prompt_tokens: int) -> Decimal:
    """Per million tokens. A prompt above a tier's start pays the tier's price from its first."""
    if price is None:
        return Decimal(0)
    if isinstance(price, Decimal):
        return price
    tiers = [tier.price for tier in price.tiers if prompt_tokens > tier.start]
    return tiers[-1] if tiers else price.base
