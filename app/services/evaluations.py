"""Golden documents: how well a model finds what people have found in the same texts."""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic_ai import CustomEvent

from app.core.json import dump_exact, load_exact
from app.core.security import Caller
from app.models import Run
from app.schemas.evaluation import (
    Evaluated,
    EvaluationCase,
    EvaluationError,
    EvaluationItem,
    EvaluationRequest,
    FieldScore,
)
from app.schemas.extraction import Attempt, ExtractionSchema, ExtractionSpec, Usage
from app.schemas.extractions import all_schemas
from app.schemas.run import Options
from app.services import prices
from app.services.answers import Unfit
from app.services.asking import ExtractionFailed, usage_of
from app.services.changes import PROGRESS
from app.services.documents import Document
from app.services.execution import Job, Outcome
from app.services.extraction import Extractions, program_of
from app.services.extractor import Extractor, Progress, target_of
from app.services.journal import Journal
from app.services.json_schema import check_value
from app.services.new_run import Idempotency, NewRun
from app.services.runs import Runs
from app.services.scores import MISSING, Counts, score

if TYPE_CHECKING:
    from pydantic_evals.evaluators import Evaluator
    from pydantic_evals.reporting import EvaluationReport

AT_ONCE = 8  # items of one evaluation


@dataclass(kw_only=True)
class ItemTried(CustomEvent, name="evaluation.item_tried", ui=False):
    """What came of one item, also for whoever takes the run over: `body` is a `Trial`."""

    item: int
    body: dict[str, Any]


class Trial(BaseModel):
    """One item's extraction. `found` is the document, in JSON with all its digits."""

    found: str | None = None
    error: EvaluationError | None = None
    requests: int = 0
    usage: Usage = Usage()
    cost: float | None = None


@dataclass(frozen=True, slots=True)
class Evaluations:
    """Accepts evaluations: an evaluation is a run whose program is a schema."""

    runs: Runs
    extractions: Extractions

    async def accept(
        self, caller: Caller, request: EvaluationRequest, idempotency: Idempotency | None = None
    ) -> Run:
        """Raises what `Extractions.spec` and `Runs.accept` raise, and Invalid for the items."""
        spec = await self.extractions.spec(caller, request)
        for at, item in enumerate(request.items):
            check_value(item.expected, f"items.{at}.expected")
        items = [item.model_dump(exclude_defaults=True) for item in request.items]
        new = NewRun(
            kind="evaluation",
            program=program_of(spec),
            idempotency=idempotency,
            options=Options(extraction=spec, echo={"items": items}),
        )
        return await self.runs.accept(caller, new)


class EvaluationExecutor:
    """Executes runs of kind `evaluation`."""

    def __init__(self, extractor: Extractor, journal: Journal) -> None:
        self._extractor = extractor
        self._journal = journal

    async def __call__(self, job: Job) -> Outcome:
        spec = job.options.extraction
        assert spec
        items = [EvaluationItem.model_validate(item) for item in job.options.echo["items"]]
        trials = {
            entry.event.item: Trial.model_validate(entry.event.body)
            for entry in job.log.entries  # of a process that died at it
            if isinstance(entry.event, ItemTried)
        }
        try:
            goldens = await asyncio.to_thread(lambda: list(_goldens(spec, items)))
            report = await self._evaluate(job, spec, goldens, trials)
            output = await asyncio.to_thread(
                lambda: _evaluated(
                    spec,
                    self._extractor.model,
                    goldens,
                    report,
                    [trials[at] for at in range(len(items))],
                )
            )
        except asyncio.CancelledError:
            return Outcome("cancelled", usage=_spent(trials.values()))
        return Outcome(
            "completed",
            finish_reason="stop",
            output=output.model_dump(mode="json"),
            usage=_spent(trials.values()),
        )

    async def _evaluate(
        self,
        job: Job,
        spec: ExtractionSpec,
        goldens: Sequence["_Golden"],
        trials: dict[int, Trial],
    ) -> "EvaluationReport[int, Any, None]":
        """Each item tried once and its document judged; `trials` are added to."""
        from pydantic_evals import Case, Dataset

        broken: list[Exception] = []

        async def find(at: int) -> Any:
            try:
                if at not in trials:
                    trial = await self._try(job, spec, goldens[at].text)
                    body = trial.model_dump(mode="json", exclude_defaults=True)
                    self._journal.append(job.log, ItemTried(item=at, body=body))
                    await self._journal.commit([(PROGRESS, {"of_run": job.run.id})], job.log)
                    trials[at] = trial
            except Exception as error:  # would become a line of the report
                broken.append(error)
                raise
            found = trials[at].found
            return MISSING if found is None else goldens[at].read(load_exact(found))

        cases = [
            Case[int, Any, None](name=str(at), inputs=at, expected_output=golden.expected)
            for at, golden in enumerate(goldens)
        ]
        dataset = Dataset[int, Any, None](
            name=program_of(spec), cases=cases, evaluators=[_agreement()]
        )
        report = await dataset.evaluate(find, max_concurrency=AT_ONCE, progress=False)
        if broken:
            raise broken[0]
        return report

    async def _try(self, job: Job, spec: ExtractionSpec, text: str) -> Trial:
        attempts: Sequence[Attempt]
        found, error = None, None
        try:
            extracted = await self._extractor.extract(
                spec, Document(text), Progress(purse=job.purse)
            )
            attempts, found = extracted.attempts, dump_exact(extracted.data)
        except ExtractionFailed as failure:
            attempts = failure.attempts
            error = EvaluationError(code=failure.code, message=failure.message)
        costs = [
            prices.cost(each.model, each.usage.prompt_tokens, each.usage.completion_tokens)
            for each in attempts
        ]
        return Trial(
            found=found,
            error=error,
            requests=len(attempts),
            usage=usage_of(attempts),
            cost=total(costs),
        )


def total(costs: Iterable[float | None]) -> float | None:
    """The sum; None where one of them is not known."""
    known = list(costs)
    return None if None in known else round(sum(cost for cost in known if cost is not None), 10)


@dataclass(frozen=True, slots=True)
class _Golden:
    """An item as it is compared. `read` makes of a document found what `expected` is made of."""

    name: str
    text: str
    expected: Any
    read: Callable[[Any], Any]
    valid: bool


def _goldens(spec: ExtractionSpec, items: Sequence[EvaluationItem]) -> Iterator[_Golden]:
    """Where the schema is a class of ours, both are compared as it reads them: 1.50 is "1.5"."""
    target = target_of(spec)
    model = all_schemas()[spec.name] if spec.body is None else None

    def read(document: Any) -> Any:
        return model.model_validate(document).model_dump() if model else document

    for number, item in enumerate(items, 1):
        name = item.name or str(number)
        try:
            target.judge(item.expected)
        except Unfit:
            yield _Golden(name, item.text, item.expected, lambda document: document, valid=False)
        else:
            yield _Golden(name, item.text, read(item.expected), read, valid=True)


def _agreement() -> "Evaluator[int, Any, None]":
    """Scores each document as `app.services.scores` does."""
    from pydantic_evals.evaluators import Evaluator, EvaluatorContext

    @dataclass(repr=False)
    class Agreement(Evaluator[int, Any, None]):
        async def evaluate(self, ctx: EvaluatorContext[int, Any, None]) -> dict[str, float | bool]:
            pair = (ctx.expected_output, ctx.output)
            report = await asyncio.to_thread(score, [pair])
            f1 = 0.0 if ctx.output is MISSING else report.total.f1
            return {"f1": f1, "exact": report.exact == 1}

    return Agreement()


def _evaluated(
    spec: ExtractionSpec,
    model: str,
    goldens: Sequence[_Golden],
    report: "EvaluationReport[int, Any, None]",
    trials: Sequence[Trial],
) -> Evaluated:
    scores = score((case.expected_output, case.output) for case in report.cases)
    return Evaluated(
        model=spec.model or model,
        schema_=ExtractionSchema(name=spec.name, version=spec.version, sha256=spec.sha256),
        items=len(goldens),
        failed=scores.failed,
        invalid_expected=sum(not golden.valid for golden in goldens),
        exact=scores.exact / scores.documents,
        precision=scores.total.precision,
        recall=scores.total.recall,
        f1=scores.total.f1,
        fields={path: _field(counts) for path, counts in scores.fields.items()},
        cases=[
            EvaluationCase(
                name=golden.name,
                f1=case.scores["f1"].value,
                exact=case.assertions["exact"].value,
                error=trial.error,
            )
            for golden, case, trial in zip(goldens, report.cases, trials, strict=True)
        ],
        usage=_usage(trials),
        cost=total(trial.cost for trial in trials),
    )


def _field(counts: Counts) -> FieldScore:
    return FieldScore(
        precision=counts.precision,
        recall=counts.recall,
        f1=counts.f1,
        support=counts.support,
    )


def _usage(trials: Iterable[Trial]) -> Usage:
    used = [trial.usage for trial in trials]
    return Usage(
        prompt_tokens=sum(each.prompt_tokens for each in used),
        completion_tokens=sum(each.completion_tokens for each in used),
        total_tokens=sum(each.total_tokens for each in used),
    )


def _spent(trials: Iterable[Trial]) -> dict[str, int]:
    trials = list(trials)
    usage = _usage(trials)
    return {
        "requests": sum(trial.requests for trial in trials),
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
    }
