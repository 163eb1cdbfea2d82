"""The application: everything is built here, and handed down."""

import asyncio
import gc
import logging
import os
import signal
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from multiprocessing import parent_process
from types import FrameType

from fastapi import APIRouter, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import RedirectResponse
from sqlalchemy.ext.asyncio import AsyncSession

from agents import all_agents
from app import PACE
from app.api.bodies import FewValues
from app.api.body_limit import BodyLimit
from app.api.entrance import Entrance
from app.api.request_ids import RequestIds
from app.api.routes import (
    agents,
    agui,
    auth,
    chat,
    conversations,
    estimates,
    evaluations,
    extraction_jobs,
    extractions,
    files,
    health,
    metrics,
    responses,
    schedules,
    schemas,
    tool_calls,
    usage,
    vercel,
    webhooks,
)
from app.api.routes import users as users_routes
from app.config import Settings, settings
from app.core import logs, siblings, traces
from app.core.errors import register_exception_handlers
from app.db import session
from app.db.migrate import migrate
from app.db.session import get_db, make_engine, make_sessions
from app.services import prices
from app.services.accounts import Accounts
from app.services.agent import AgentExecutor
from app.services.attachments import Attachments
from app.services.conversations import Conversations
from app.services.driver import JobExecutor
from app.services.estimates import Estimates
from app.services.evaluations import EvaluationExecutor, Evaluations
from app.services.execution import Executor
from app.services.extraction import ExtractionExecutor, Extractions
from app.services.extractor import Extractor
from app.services.files import Files
from app.services.jobs import Jobs
from app.services.journal import Journal
from app.services.model import Models, make_models
from app.services.operations import Operations
from app.services.outbound import Allowed, make_http
from app.services.readiness import Readiness
from app.services.retention import Retention
from app.services.runs import Runs
from app.services.schedules import Schedules
from app.services.schemas import Schemas
from app.services.tool_calls import ToolCalls
from app.services.usage import Usages
from app.services.user import UserService
from app.services.webhooks import WebhookExecutor, announce
from app.services.worker import Worker

logger = logging.getLogger(__name__)


@contextmanager
def early_notice(stop: Callable[[], Awaitable[None]], patience: float) -> Generator[None]:
    """Calls `stop` at the first signal to end.

    A server ends a lifespan only when the last connection is closed, and open streams close only
    when the runs behind them are handed over: somebody has to begin. A deploy's SIGTERM (one or
    more: its supervisor's and its parent's) reaches the server when that is done, so that until
    then there is somebody to say that new work is refused. After so many seconds the process
    ends, whatever still holds it: a thread that hangs in a tool would do so for ever.
    """
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in signals}
    noticed = False

    def pass_on(number: int, frame: FrameType | None = None) -> None:
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    def notice(number: int, frame: FrameType | None) -> None:
        nonlocal noticed
        is_first, noticed = not noticed, True
        if is_first:
            loop.call_soon_threadsafe(begin, number)
        if number != signal.SIGTERM:
            pass_on(number, frame)
        elif is_first:
            last = threading.Timer(patience, os._exit, [1])
            last.daemon = True
            last.start()

    def begin(number: int) -> None:
        stopping = asyncio.ensure_future(stop())
        if number == signal.SIGTERM:
            stopping.add_done_callback(lambda _: pass_on(number))

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears signals
        return
    if parent := parent_process():  # of several processes: when it dies, nobody else tells them

        def follow() -> None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=follow, daemon=True).start()
    for number, handler in before.items():
        if callable(handler):
            signal.signal(number, notice)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _warm(models: Models) -> None:
    """Loads what the first run needs, and a start does not wait for. What is there by then, some
    300,000 objects, stays to the end: the collector need not look at it again, which takes a fifth
    of the time of short requests."""
    _ = models.model
    prices.cost(models.name, 0, 0)
    gc.freeze()
    gc.set_threshold(*PACE)


def create_app(settings: Settings = settings) -> FastAPI:
    """The app for these settings. Nothing is opened before its lifespan begins."""
    own = settings is not session.settings
    engine = make_engine(settings) if own else session.engine
    sessions = make_sessions(engine) if own else session.async_session

    @asynccontextmanager
    async def users() -> AsyncGenerator[UserService]:
        async with sessions() as db:
            yield UserService(db)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        if not own:
            logs.begin(settings)
            traces.begin(settings)
        # A file that cannot be used is told now, not to the first who asks.
        if settings.default_agent not in all_agents():
            known = ", ".join(all_agents())
            raise ValueError(f"DEFAULT_AGENT: no agent {settings.default_agent!r}; {known}.")
        if settings.migrate_on_start:
            await migrate(engine)
        if not settings.auth_required:
            async with users() as service:
                app.state.local_admin_id = await service.ensure_local_admin()
        models = make_models(settings)
        http = make_http(settings)
        fetching = make_http(settings, Allowed.of_users(settings))
        journal = Journal(engine, settings.database_timeout.total_seconds())
        executors: dict[str, Executor] = {}
        worker = Worker(settings, engine, journal, executors, announce)
        attachments = Attachments(engine, fetching, settings)
        runs = Runs(engine, journal, worker, attachments, models.name)
        files_, schemas_ = Files(engine, settings), Schemas(engine)
        extractor = Extractor(models, settings.run_cost)
        extractions_ = Extractions(settings, runs, schemas_, files_, extractor.model)
        driver = JobExecutor(engine, journal, worker)
        agent = AgentExecutor(settings, engine, journal, models, http, users, extractions_.read)
        executors |= {
            "agent": agent,
            "extraction": ExtractionExecutor(engine, journal, extractor, driver.throttled),
            "job": driver,
            "evaluation": EvaluationExecutor(extractor, journal),
            "webhook": WebhookExecutor(fetching, settings),
        }
        app.state.accounts = accounts = Accounts(engine, worker, users)
        app.state.admission = models.admission
        app.state.runs = runs
        app.state.tool_calls = ToolCalls(engine, agent)
        app.state.readiness = Readiness(engine, journal)
        app.state.operations = Operations(engine)
        app.state.files = files_
        app.state.schemas = schemas_
        app.state.conversations = Conversations(engine, runs)
        app.state.extractions = extractions_
        app.state.estimates = Estimates(settings, extractions_, files_, extractor.model)
        app.state.evaluations = Evaluations(runs, extractions_)
        app.state.jobs = Jobs(settings, engine, journal, worker, runs, extractor.model)
        app.state.usages = Usages(engine, settings)
        app.state.schedules = schedules_ = Schedules(engine, runs)
        retention = Retention(settings, engine, accounts)
        journal.start()
        worker.begin()
        schedules_.start()
        retention.start()
        warming = asyncio.create_task(asyncio.to_thread(_warm, models))
        sharing = asyncio.create_task(siblings.share())

        async def stop() -> None:
            app.state.stopping = True
            await worker.close()

        try:
            with early_notice(stop, settings.shutdown_timeout.total_seconds()):
                yield
        finally:
            app.state.stopping = True
            sharing.cancel()
            await asyncio.wait([warming, sharing])
            await schedules_.close()
            await retention.close()
            await worker.close()
            await journal.close()
            await http.aclose()
            await fetching.aclose()
            await models.close()
            await engine.dispose()
            await asyncio.to_thread(traces.end)

    app = FastAPI(
        title="agent-backend",
        description="LLM agents over HTTP. Every answer is a run, written down as it happens.",
        lifespan=lifespan,
        telemetry={
            "tracing": settings.otel_exporter_otlp_endpoint is not None,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
        },
    )
    app.add_middleware(FewValues)
    app.add_middleware(Entrance)
    app.add_middleware(BodyLimit, max_body_size=settings.max_body_bytes)
    app.add_middleware(RequestIds)
    # Callers are known by a bearer and never by a cookie, so no page gets credentials of theirs.
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origins,
        allow_origin_regex=settings.cors,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["Retry-After", "X-Request-Id", "X-Vercel-AI-UI-Message-Stream"],
        max_age=3600,
    )
    app.state.settings = settings
    app.state.local_admin_id = 0
    app.state.stopping = False
    register_exception_handlers(app)
    for route in (
        health,
        metrics,
        users_routes,
        auth,
        agents,
        chat,
        responses,
        conversations,
        agui,
        vercel,
        files,
        extractions,
        estimates,
        extraction_jobs,
        evaluations,
        schemas,
        schedules,
        tool_calls,
        usage,
        webhooks,
    ):
        app.include_router(route.router)
    large = APIRouter(max_body_size=settings.max_job_bytes)
    large.include_router(extraction_jobs.uploads)
    app.include_router(large)
    if own:  # an app for other settings brings its own database

        async def get_own_db() -> AsyncGenerator[AsyncSession]:
            async with sessions() as db:
                yield db

        app.dependency_overrides[get_db] = get_own_db

    @app.get("/", include_in_schema=False)
    async def home() -> RedirectResponse:  # pyright: ignore[reportUnusedFunction]
        return RedirectResponse("/docs")

    return app


app = create_app()
