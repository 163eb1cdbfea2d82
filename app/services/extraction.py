"""Extractions as runs: accepted durably, and asked once for all who ask the same."""

import asyncio
import hashlib
import json
from collections.abc import Callable
from typing import Any

from pydantic_ai.messages import BinaryContent, ModelRequest, UserPromptPart
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncEngine

from app.config import Settings
from app.core.errors import Invalid
from app.core.json import dump_exact, load_exact
from app.core.security import Caller
from app.db.session import reading
from app.models import Run
from app.schemas.extraction import (
    Attempt,
    Extracted,
    ExtractionOptions,
    ExtractionRequest,
    ExtractionSpec,
    SpecRequest,
    Usage,
)
from app.schemas.run import Options
from app.services import chunks, webhooks
from app.services.answers import digest
from app.services.asking import ExtractionFailed
from app.services.documents import Document, read_document
from app.services.execution import Job, Outcome
from app.services.extraction_log import AttemptFailed, ChunkExtracted, ChunkFailed
from app.services.extractor import INSTRUCTIONS, QUOTING, Extractor, Progress, target_of
from app.services.files import Files
from app.services.journal import Journal
from app.services.json_schema import Json, as_object, bounded
from app.services.model import bare_name
from app.services.new_run import Idempotency, NewRun
from app.services.refusals import run_failed
from app.services.run_log import RunEnded
from app.services.runs import Runs
from app.services.schemas import Schemas

SPECS = 100  # of jobs, kept in memory
COPIED = "copied"  # how a run ended that was answered from another
GATHERING = 0.002  # seconds in which the items of a job wait for each other


class ModelNotAllowed(Invalid):
    code = "model_not_allowed"


class Extractions:
    """Accepts extractions: an extraction is a run whose program is a schema."""

    def __init__(
        self, settings: Settings, runs: Runs, schemas: Schemas, files: Files, model: str
    ) -> None:
        self._settings = settings
        self._runs = runs
        self._schemas = schemas
        self._files = files
        self._model = model

    async def accept(
        self, caller: Caller, request: ExtractionRequest, idempotency: Idempotency | None = None
    ) -> Run:
        """Raises what `spec` raises, Invalid for the input, and what `Runs.accept` raises."""
        spec = await self.spec(caller, request)
        if request.webhook:
            webhooks.check_url(request.webhook.url, self._settings)
        document = await read_document(caller, request.input, self._files, self._settings)
        if document.images and spec.options.evidence != "none":
            raise Invalid(
                "A picture has no text to quote: ask without evidence.", param="options.evidence"
            )
        options = Options(
            extraction=spec,
            stream=request.stream,
            webhook=request.webhook and request.webhook.url,
            echo={"of_file": True} if document.of_file else {},
        )
        new = NewRun(
            kind="extraction",
            program=program_of(spec),
            prompt=list(document.images) or document.text,
            idempotency=idempotency,
            cache_key=cache_key(spec, document),
            options=options,
            param="input",
        )
        return await self._runs.accept(caller, new)

    async def read(self, caller: Caller, text: str, schema_ref: str) -> Any:
        """The document that the text is of that schema. Raises AppError."""
        body = {"input": {"text": text}, "schema_ref": schema_ref}
        request = ExtractionRequest.model_validate(body)
        run = await self.accept(caller, request)
        try:
            event = (await self._runs.wait(run))[-1].event
        except asyncio.CancelledError:  # whoever asked is stopped, and with them the model
            await asyncio.shield(self._runs.cancel(caller, run.id))
            raise
        assert isinstance(event, RunEnded)
        if event.status != "completed":
            raise run_failed(event.error or {}, acted=False)
        return json.loads(dump_exact(extracted_of(event.output).data))

    async def spec(self, caller: Caller, request: SpecRequest) -> ExtractionSpec:
        """All that is to be known but the text.

        Raises SchemaRejected, SchemaNotFound, ModelNotAllowed, and Invalid for the options.
        """
        options = request.options
        for place, name in (
            ("model", request.model),
            *(("options.fallback_models", name) for name in options.fallback_models),
        ):
            self._check_model(name, place)
        plain = ExtractionOptions(
            **{name: getattr(options, name) for name in ExtractionOptions.model_fields}
        )
        plain.token_budget = self._token_budget(options)
        plain.fallback_models = [bare_name(name) for name in plain.fallback_models]
        spec = ExtractionSpec(
            instructions=request.instructions,
            model=bare_name(request.model or self._model),
            mode=self._settings.extraction_mode,
            options=plain,
        )
        if request.schema_ref is not None:
            found = await self._schemas.resolve(caller, request.schema_ref)
            spec.name, spec.version = found.name, found.version
            spec.body, spec.sha256 = found.body, found.sha256
        else:
            assert request.inline is not None
            bounded(request.inline)
            spec.body, spec.sha256 = as_object(request.inline), digest(request.inline)
        target = target_of(spec)  # a schema that cannot be compiled is told now
        if plain.chunking:
            plain.chunking.list_path = chunks.find_list(target.schema, plain.chunking.list_path)
        return spec

    def _token_budget(self, options: ExtractionOptions) -> int:
        most = self._settings.run_tokens
        if options.token_budget > most and "token_budget" in options.model_fields_set:
            raise Invalid(
                f"At most {most} tokens are spent on one extraction here (RUN_TOKENS).",
                param="options.token_budget",
            )
        return min(options.token_budget, most)

    def _check_model(self, name: str | None, param: str) -> None:
        allowed = {self._model, *map(bare_name, self._settings.extraction_models)}
        if name is not None and bare_name(name) not in allowed:
            raise ModelNotAllowed(
                f"Model {name[:100]!r} is not allowed here; allowed: {', '.join(sorted(allowed))}.",
                param=param,
            )


def program_of(spec: ExtractionSpec) -> str:
    return spec.name if spec.version is None else f"{spec.name}@{spec.version}"


def cache_key(spec: ExtractionSpec, document: Document) -> str:
    """Equal for what must have equal answers: schema, text, model, options and our own prompt."""
    options = spec.options.model_dump(exclude={"cache"})
    images = [hashlib.sha256(image.data).hexdigest() for image in document.images]
    parts = (
        *(spec.name if spec.body is None else "", spec.sha256, spec.model, spec.mode),
        *(spec.instructions, options, images, document.text, INSTRUCTIONS, QUOTING),
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def extracted_of(output: Any) -> Extracted:
    """What a completed run has found, of its `output`: numbers keep all their digits."""
    return Extracted.model_validate(load_exact(output))


class ExtractionExecutor:
    """Executes runs of kind `extraction`, alone or as items of a job."""

    def __init__(
        self,
        engine: AsyncEngine,
        journal: Journal,
        extractor: Extractor,
        throttled: Callable[[str, float | None], None],
    ) -> None:
        self._reads = reading(engine)
        self._journal = journal
        self._extractor = extractor
        self._throttled = throttled
        self._specs: dict[str, ExtractionSpec] = {}
        self._flights: dict[tuple[int, str], asyncio.Future[Outcome | None]] = {}
        self._lookups = _Lookups(engine)

    async def __call__(self, job: Job) -> Outcome:
        spec = job.options.extraction or await self._spec_of(str(job.run.batch_id))
        if spec.options.cache == "bypass" or job.run.cache_key is None:
            return await self._extract(job, spec)
        return await self._once(job, spec, job.run.cache_key)

    async def _once(self, job: Job, spec: ExtractionSpec, key: str) -> Outcome:
        """The answer that is there already, or comes for somebody else, or is asked for now."""
        place = (job.run.owner_id, key)
        while flight := self._flights.get(place):
            shared = await asyncio.shield(flight)
            if shared:  # else whoever asked was stopped, and the next one asks
                return again(shared, "coalesced")
        flight = self._flights[place] = asyncio.get_running_loop().create_future()
        ended: Outcome | None = None
        try:
            known = await self._lookups.find(job.run.owner_id, key, many=bool(job.run.batch_id))
            outcome = again(known, "hit") if known else await self._extract(job, spec)
            ended = outcome if outcome.status != "cancelled" else None
            return outcome
        finally:
            del self._flights[place]
            flight.set_result(ended)

    async def _spec_of(self, batch_id: str) -> ExtractionSpec:
        if batch_id not in self._specs:
            async with self._reads.connect() as connection:
                stored = await connection.scalar(select(Run.options).where(Run.id == batch_id))
            spec = Options.model_validate_json(str(stored)).extraction
            assert spec
            if len(self._specs) >= SPECS:
                self._specs.clear()
            self._specs[batch_id] = spec
        return self._specs[batch_id]

    async def _extract(self, job: Job, spec: ExtractionSpec) -> Outcome:
        progress = self._progress(job)
        try:
            found = await self._extractor.extract(spec, _document(job), progress)
        except asyncio.CancelledError:
            return Outcome("cancelled", usage=_spent(job, progress))
        except ExtractionFailed as failure:
            error = {
                "code": failure.code,
                "message": failure.message,
                "retryable": failure.retryable,
                "pointer": failure.pointer,
                "transport_retries": failure.transport_retries,
                "attempts": [each.model_dump(mode="json") for each in failure.attempts],
            }
            return Outcome("failed", error=error, usage=_spent(job, progress))
        return Outcome(
            "completed",
            finish_reason="stop" if found.status == "completed" else "partial",
            output=dump_exact(found.model_dump()),
            usage=_spent(job, progress),
        )

    def _progress(self, job: Job) -> Progress:
        batch_id = job.run.batch_id
        progress = Progress(
            hear=lambda event: self._journal.append(job.log, event),
            stream=job.options.stream,
            purse=job.purse,
            throttled=(lambda after: self._throttled(batch_id, after)) if batch_id else None,
        )
        for entry in job.log.entries:  # of a process that died at it
            match entry.event:
                case AttemptFailed(body=body):
                    progress.attempts.append(Attempt.model_validate(body))
                case ChunkExtracted(chunk=chunk, attempts=attempts) as done:
                    progress.done[chunk] = done
                    progress.attempts += [Attempt.model_validate(each) for each in attempts]
                case ChunkFailed(chunk=chunk) as failed:
                    progress.failed[chunk] = failed
                case _:
                    pass
        return progress


def _document(job: Job) -> Document:
    first = job.messages[0] if job.messages else None
    parts = first.parts if isinstance(first, ModelRequest) else ()
    contents = [part.content for part in parts if isinstance(part, UserPromptPart)]
    images = [
        each
        for content in contents
        if not isinstance(content, str)
        for each in content
        if isinstance(each, BinaryContent)
    ]
    return Document(images=images) if images else Document(job.options.text)


def _spent(job: Job, progress: Progress) -> dict[str, int]:
    """Of this run in all: an item that is tried again adds to what it has cost before."""
    spending = progress.spending
    usage = spending.usage if spending else Usage()
    now = {
        "requests": len(spending.attempts) if spending else 0,
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
    }
    before: dict[str, int] = json.loads(job.run.usage) if job.run.usage else {}
    return {name: count + before.get(name, 0) for name, count in now.items()}


def again(outcome: Outcome, how: str) -> Outcome:
    """The same answer for somebody else, who has spent nothing on it."""
    nothing: Json = {"attempts": [], "transport_retries": 0}
    error = outcome.error and {**outcome.error, **nothing}
    output = outcome.output
    if output is not None:
        free = {"cache": how, "usage": Usage().model_dump(), "cost": 0.0}
        output = dump_exact({**load_exact(output), **nothing, **free})
    # Not "stop": nothing is answered from a copy when the answer itself is forgotten.
    reason = COPIED if outcome.finish_reason == "stop" else outcome.finish_reason
    return Outcome(outcome.status, reason, output=output, error=error)


class _Lookups:
    """Finds earlier answers; what is looked for at the same time takes one query."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._reads = reading(engine)
        self._wanted: dict[tuple[int, str], asyncio.Future[Outcome | None]] = {}
        self._task: asyncio.Task[None] | None = None

    async def find(self, owner_id: int, key: str, *, many: bool) -> Outcome | None:
        """The caller's newest whole answer to the same question. With `many` others are waited
        for, who ask in the next moment."""
        if not self._wanted:
            self._task = asyncio.create_task(self._look(GATHERING if many else 0))
        future = asyncio.get_running_loop().create_future()
        return await asyncio.shield(self._wanted.setdefault((owner_id, key), future))

    async def _look(self, delay: float) -> None:
        await asyncio.sleep(delay)
        wanted, self._wanted = self._wanted, {}
        newest = func.row_number().over(
            partition_by=(Run.owner_id, Run.cache_key), order_by=Run.created_at.desc()
        )
        known = (
            select(Run.id, newest.label("age"))
            .where(
                Run.cache_key.in_([key for _, key in wanted]),
                Run.owner_id.in_({owner for owner, _ in wanted}),
                Run.status == "completed",
                Run.finish_reason == "stop",
                Run.deleted_at.is_(None),
            )
            .subquery()
        )
        query = (
            select(Run.owner_id, Run.cache_key, Run.output)
            .join(known, known.c.id == Run.id)
            .where(known.c.age == 1)
        )
        found: dict[tuple[int, str], Outcome] = {}
        try:
            async with self._reads.connect() as connection:
                for row in await connection.execute(query):
                    output = json.loads(row.output)
                    outcome = Outcome("completed", finish_reason="stop", output=output)
                    found[row.owner_id, row.cache_key] = outcome
        except Exception as error:
            for future in wanted.values():
                future.set_exception(error)
            return
        for place, future in wanted.items():
            future.set_result(found.get(place))
