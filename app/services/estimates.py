"""What extractions would take, before any is made: tokens, calls, and what they would cost."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from functools import cache, partial

from app.config import Settings
from app.core.security import Caller
from app.schemas.evaluation import CostRange, Estimate, EstimateRequest
from app.schemas.extraction import ExtractionSpec
from app.services import chunks, prices
from app.services.documents import Document, read_document
from app.services.evaluations import total
from app.services.extraction import Extractions
from app.services.extractor import INSTRUCTIONS, PARTIAL, QUOTING, target_of
from app.services.files import Files

IMAGE_TOKENS = 765  # OpenAI's price of 1024 x 1024 pixels in high detail

Call = tuple[int, int]  # prompt tokens, completion tokens


class Estimates:
    def __init__(
        self, settings: Settings, extractions: Extractions, files: Files, model: str
    ) -> None:
        self._settings = settings
        self._extractions = extractions
        self._files = files
        self._model = model

    async def estimate(self, caller: Caller, request: EstimateRequest) -> Estimate:
        """No model is asked. Raises what `Extractions.spec` and `read_document` raise."""
        spec = await self._extractions.spec(caller, request)
        if request.input:
            documents = [await read_document(caller, request.input, self._files, self._settings)]
        else:
            documents = [Document(item.text) for item in request.items or ()]
        model = spec.model or self._model
        return await asyncio.to_thread(_estimate, spec, model, documents)


def tokens(text: str) -> int:
    """About how many: a quarter of its bytes in UTF-8, rounded up.

    So four letters of English are one, and four characters of Chinese are three.
    """
    return -(-len(text.encode()) // 4)


def _estimate(spec: ExtractionSpec, model: str, documents: Sequence[Document]) -> Estimate:
    models = [model, *spec.options.fallback_models]
    unique = list({document.text: document for document in documents}.values())
    target = target_of(spec)
    first = cache(partial(_dearest, [model]))  # few calls differ in size
    any_of = cache(partial(_dearest, models))
    shown = tokens(json.dumps(target.shown, ensure_ascii=False))
    least, most = list[float | None](), list[float | None]()
    prompts = calls = 0
    for document in unique:
        pieces = _pieces(spec, document)
        told = (
            INSTRUCTIONS,
            QUOTING if spec.options.evidence != "none" else None,
            PARTIAL if len(pieces) > 1 else None,
            target.guide,
            spec.instructions,
        )
        head = tokens("\n\n".join(part for part in told if part)) + shown
        head += IMAGE_TOKENS * len(document.images)
        # An answer copies no more than its text, under the names of the schema.
        asked = [(head + tokens(piece), shown + tokens(piece)) for piece in pieces]
        prompts += sum(prompt for prompt, _ in asked)
        calls += len(pieces) * spec.options.max_attempts
        made = list(_worst(spec, asked))
        least += [first((prompt, 0)) for prompt, _ in made[: len(asked)]]
        most += [any_of(call) for call in made]
    low, high = total(least), total(most)
    return Estimate(
        items=len(documents),
        unique_items=len(unique),
        prompt_tokens_estimated=prompts,
        max_calls=calls,
        cost=None if low is None or high is None else CostRange(min=low, max=high),
    )


def _pieces(spec: ExtractionSpec, document: Document) -> list[str]:
    chunking, text = spec.options.chunking, document.text
    if chunking is None or len(text) <= chunking.max_chars:
        return [text]
    places = chunks.cut(text, chunking.max_chars, chunking.overlap_chars)
    return [text[place.start : place.end] for place in places]


def _worst(spec: ExtractionSpec, asked: Sequence[Call]) -> Iterator[Call]:
    """The calls for one document if no answer but the last is valid, until its budget is spent.

    Each prompt carries the answers before it.
    """
    spent = 0
    for earlier in range(spec.options.max_attempts):
        for prompt, answer in asked:
            if spent >= spec.options.token_budget:
                return
            call = prompt + earlier * answer, answer
            spent += sum(call)
            yield call


def _dearest(models: Sequence[str], call: Call) -> float | None:
    costs = [prices.cost(model, *call) for model in models]
    return None if None in costs else max(cost for cost in costs if cost is not None)
